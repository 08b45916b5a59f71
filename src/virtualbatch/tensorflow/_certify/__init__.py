"""Certifying on TensorFlow."""
