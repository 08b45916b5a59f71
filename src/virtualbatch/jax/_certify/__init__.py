"""Certifying on JAX."""
