"""Memory as JAX sees it: what is left, and which errors mean that it ran out."""

import re
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.plan.host_memory import host_memory

# What JAX raises for an allocation: a ValueError where it makes an array, else an error of its own.
KINDS = (MemoryError, ValueError, jax.errors.JaxRuntimeError)

# XLA has this code for quotas and messages that are too long as well.
_TEXT = re.compile(r"RESOURCE_EXHAUSTED: .*(out of memory|alloc)", re.IGNORECASE | re.DOTALL)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; by its class, else by its text.

    Args:
        error: what was raised.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, KINDS) and bool(_TEXT.match(str(error)))


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
