"""Gradient accumulation inside the Lightning Trainer, exact: one line for one module."""
