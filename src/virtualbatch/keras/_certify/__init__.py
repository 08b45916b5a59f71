"""Certifies Keras models."""
