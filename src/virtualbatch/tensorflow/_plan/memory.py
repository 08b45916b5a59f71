"""Memory as TensorFlow sees it: what is left, and which errors mean that it ran out."""

import os
import re
import sys
from typing import Any

import tensorflow as tf

from virtualbatch.plan.host_memory import host_memory

# What TensorFlow raises for an allocation; on a GPU some come as errors of the device.
KINDS = (MemoryError, tf.errors.ResourceExhaustedError, tf.errors.InternalError)

# The codes stand for quotas, messages that are too long and broken kernels as well.
_TEXT = re.compile(
    r"\bOOM\b|out of memory|out_of_memory|fail\w* to allocate|allocating \d|alloc_failed",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; by its class, then by its text.

    Args:
        error: what was raised.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, KINDS) and bool(_TEXT.search(str(error)))


def left_bytes() -> int | None:
    """Bytes that a window may still take on the first GPU, or on the host if there is none.

    None on a GPU without a limit of its own: TensorFlow does not say what a GPU has, and its
    allocator takes nearly all of it.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if not gpus:
        return min(host_memory().left_bytes, _allocator_left_bytes())
    limits = tf.config.get_logical_device_configuration(tf.config.list_physical_devices("GPU")[0])
    limit = limits[0].memory_limit if limits else None
    details = tf.config.experimental.get_memory_info(gpus[0].name)
    return None if limit is None else int(limit * 2**20 - details["current"])


def _allocator_left_bytes() -> int:
    """What TensorFlow's allocator on the host may still take, where it has a limit of its own."""
    used = os.environ.get("TF_CPU_ALLOCATOR_USE_BFC", "").lower() in ("true", "1")
    limit = os.environ.get("TF_CPU_BFC_MEM_LIMIT_IN_MB", "")
    if not (used and limit.isdecimal()):
        return sys.maxsize
    current = tf.config.experimental.get_memory_info("CPU:0")["current"]
    return int(limit) * 2**20 - int(current)


def largest_variables(variables: Any) -> list[tuple[str, int]]:
    """Names and bytes of the three largest variables, largest first."""
    sizes = [
        (found.name, found.shape.num_elements() * tf.as_dtype(found.dtype).size)
        for found in tf.nest.flatten(variables)
    ]
    return sorted(sizes, key=lambda found: -found[1])[:3]
