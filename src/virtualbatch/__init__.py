"""Exact gradient accumulation: keep your batch; name the size that fits.

This module holds the framework-neutral names. Each engine is imported by the user:
`virtualbatch.tensorflow` for GradientTape loops, `virtualbatch.keras` for `fit`,
`virtualbatch.torch` for PyTorch loops and `virtualbatch.jax` for JAX.
"""

from virtualbatch.certify.certificate import Certificate, Finding
from virtualbatch.certify.loop import certify_loop
from virtualbatch.noise.advice import Advice
from virtualbatch.noise.estimate import NoiseEstimate, NoiseScale, WindowStats
from virtualbatch.plan.auto import Auto
from virtualbatch.plan.plan import Plan, PlanRow
from virtualbatch.window.groups import whole_groups
from virtualbatch.window.packing import pack
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import AuxLossFn, LossFn, WeightFn
from virtualbatch.window.window import Window

__all__ = [
    "Advice",
    "Auto",
    "AuxLossFn",
    "Certificate",
    "Finding",
    "LossFn",
    "NoiseEstimate",
    "NoiseScale",
    "Plan",
    "PlanRow",
    "WeightFn",
    "Window",
    "WindowStats",
    "certify_loop",
    "pack",
    "whole_groups",
    "windows",
]

__version__ = "0.2.0"
