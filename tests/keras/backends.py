"""What plain Keras does not do on every backend, and so accumulation need not either.

A case names what it needs; `supported` keeps those that the backend under test can run. What only
makes sense on one backend at all is in the folder of its name.
"""

import keras
import pytest

BACKEND = keras.backend.backend()

# What a case may need -> backend without it -> why.
LACKING = {
    "steps_per_execution": {
        "torch": "raises: `steps_per_execution` must be 1 with the PyTorch backend",
    },
    "jit_compile": {
        "torch": "compiles the reference for half a minute; see torch/test_modes.py",
    },
    "values in call": {
        "jax": "differentiates a trace of the model, also where it runs eagerly",
    },
    "unreduced losses": {
        "torch": "raises: grad can be implicitly created only for scalar outputs",
        "jax": "raises: gradient only defined for scalar-output functions",
    },
    "weights narrower than the mask": {
        "torch": "raises: it multiplies sample weights by the mask in place",
    },
    "masked weights in metrics": {
        "torch": "counts the mask twice, for the same reason; see torch/test_peculiarities.py",
    },
    "masked metrics": {
        "jax": "loses the mask of predictions before metrics see them",
    },
    "metrics in layers": {
        "jax": "raises: a layer cannot update a metric while it is traced without it",
    },
    "layers that run again": {
        "tensorflow": "raises: in a graph, what runs again takes no keywords such as training",
    },
    "string tensors": {
        "torch": "has no tensors of text",
        "jax": "has no tensors of text",
    },
}


def available(*needs):
    """Whether the backend under test has all of these."""
    return not any(BACKEND in LACKING[need] for need in needs)


def supported(cases):
    """The cases that plain Keras can run on the backend under test."""
    return [case for case in cases if available(*case.needs)]


def modes():
    """Arguments of `compile` for every way in which Keras runs a step on this backend."""
    thorough = pytest.mark.thorough("another way of running the same window; see test_modes.py")
    further = [{"run_eagerly": True}, {"jit_compile": True}][: 1 + available("jit_compile")]
    return [{}, *(pytest.param(mode, marks=thorough) for mode in further)]


def ignored(backend):
    """Folders of tests that belong to other backends."""
    return [name for name in ("tensorflow", "torch", "jax") if name != backend]
