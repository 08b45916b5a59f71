"""Exact gradient accumulation: keep your batch; name the size that fits.

This module holds the framework-neutral names. Each engine is imported by the user:
`virtualbatch.tensorflow` for GradientTape loops, `virtualbatch.keras` for `fit`,
`virtualbatch.torch` for PyTorch loops and `virtualbatch.jax` for JAX.
"""

from virtualbatch.loops import certify_loop
from virtualbatch.noise import NoiseScale, WindowStats
from virtualbatch.packing import pack
from virtualbatch.sizes import Auto
from virtualbatch.split import Window, windows

__all__ = ["Auto", "NoiseScale", "Window", "WindowStats", "certify_loop", "pack", "windows"]

__version__ = "0.1.0"
