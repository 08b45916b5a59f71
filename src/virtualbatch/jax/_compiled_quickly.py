"""Compiling a program that runs once or twice: optimising it takes longer than it saves."""

from functools import partial

import jax

# JAX takes compiler options at the outermost jit only.
compiled_quickly = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
