"""Certifying on PyTorch."""
