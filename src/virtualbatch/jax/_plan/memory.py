"""Memory as JAX sees it: what is left, and which errors mean that it ran out."""

import re
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.out_of_memory import MemoryErrors, any_of

ERRORS = MemoryErrors(
    classes=(),
    # JAX raises a ValueError when it creates an array, and its own error elsewhere.
    kinds=(MemoryError, ValueError, jax.errors.JaxRuntimeError),
    # XLA also uses this code for quotas and for messages that are too long.
    certain=re.compile(r"\ARESOURCE_EXHAUSTED: .*(out of memory|alloc)", re.IGNORECASE | re.DOTALL),
    ambiguous=any_of(
        # All that XLA says on a CPU if a kernel gets no memory of its own.
        "INTERNAL: YNNPACK operation failed",
        # If XLA has reserved nearly all memory, libraries find too little and fail to start:
        # https://github.com/jax-ml/jax/issues/16078
        "DNN library initialization failed",
        "CUDNN_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
)


def left_bytes() -> int:
    """Free bytes of the first device, or of the host if the device has no memory statistics."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is None:
        return host_memory().left_bytes
    return int(statistics["bytes_limit"] - statistics["bytes_in_use"])


def largest_arrays(arguments: Any) -> list[tuple[str, int]]:
    """Names and bytes of the three largest arrays of some arguments, largest first."""
    leaves, _ = tree_flatten_with_path(arguments)
    sizes = [(keystr(place), x.nbytes) for place, x in leaves if hasattr(x, "nbytes")]
    return sorted(sizes, key=lambda found: -found[1])[:3]
