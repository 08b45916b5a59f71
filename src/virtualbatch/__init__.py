"""Exact gradient accumulation: keep your batch; name the size that fits.

This module holds the framework-neutral names. Each engine is imported by the user:
`virtualbatch.tensorflow` for GradientTape loops, `virtualbatch.keras` for `fit`, and
`virtualbatch.torch` for PyTorch loops.
"""

from virtualbatch.split import Window, windows

__all__ = ["Window", "windows"]

__version__ = "0.1.0"
