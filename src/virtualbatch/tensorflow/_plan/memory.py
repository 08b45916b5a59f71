"""Memory as TensorFlow sees it: what is left, and which errors mean that it ran out."""

import os
import re
import sys
from typing import Any

import tensorflow as tf

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.out_of_memory import MemoryErrors, any_of

ERRORS = MemoryErrors(
    classes=(),
    # On a GPU some failed allocations are errors of the device. With oneDNN they are aborted
    # operations.
    kinds=(
        MemoryError,
        tf.errors.ResourceExhaustedError,
        tf.errors.InternalError,
        tf.errors.AbortedError,
        tf.errors.UnknownError,
    ),
    # The error classes are also used for quotas, messages that are too long and broken kernels.
    certain=re.compile(
        r"\bOOM\b|out of memory|out_of_memory|fail\w* to allocate|allocating \d"
        r"|cudnn_status_\w*alloc\w*_failed",
        re.IGNORECASE,
    ),
    ambiguous=any_of(
        # oneDNN does not say that an allocation failed, and says the same of other faults:
        # https://github.com/uxlfoundation/oneDNN/issues/1500
        "could not create a primitive",
        "could not execute a primitive",
        "could not create a memory object",
        # An error of XLA, which compiles functions with jit_compile.
        "YNNPACK operation failed",
        # A handle did not fit in memory, or the driver does not match:
        # https://github.com/tensorflow/tensorflow/issues/24496
        "CUDNN_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "DNN library initialization failed",
        "probably because cuDNN failed to initialize",
    ),
)


def left_bytes() -> int | None:
    """Bytes that a window may still take on the first GPU, or on the host if there is none.

    None on a GPU without a limit of its own: TensorFlow does not tell the memory of a GPU, and its
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
    """Bytes that TensorFlow's allocator on the host may still take, if it has its own limit."""
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
