"""Certifying a model of Keras."""
