"""Memory as JAX sees it: what is left, and which errors mean that it ran out."""

import re
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.out_of_memory import MemoryErrors, any_of

ERRORS = MemoryErrors(
    classes=(),
    # A ValueError where JAX makes an array, else an error of its own.
    kinds=(MemoryError, ValueError, jax.errors.JaxRuntimeError),
    # XLA has this code for quotas and messages that are too long as well.
    certain=re.compile(r"\ARESOURCE_EXHAUSTED: .*(out of memory|alloc)", re.IGNORECASE | re.DOTALL),
    ambiguous=any_of(
        # All that XLA says on a CPU where a kernel gets no memory of its own.
        "INTERNAL: YNNPACK operation failed",
        # XLA leaves to the allocator what it did not reserve, and libraries then fail to start:
        # https://github.com/jax-ml/jax/issues/16078
        "DNN library initialization failed",
        "CUDNN_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
)


def left_bytes() -> int:
    """Bytes that the first device, or the host that it stands for, has left."""
    statistics = jax.devices()[0].memory_stats()
    if statistics is None:
        return host_memory().left_bytes
    return int(statistics["bytes_limit"] - statistics["bytes_in_use"])


def largest_arrays(arguments: Any) -> list[tuple[str, int]]:
    """Names and bytes of the three largest arrays of some arguments, largest first."""
    leaves, _ = tree_flatten_with_path(arguments)
    sizes = [(keystr(place), x.nbytes) for place, x in leaves if hasattr(x, "nbytes")]
    return sorted(sizes, key=lambda found: -found[1])[:3]
