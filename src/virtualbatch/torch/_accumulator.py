"""`accumulator_dtype`: whether gradients are summed in bfloat16, and rounded from which seed."""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from virtualbatch.torch._distributed import classes_of
from virtualbatch.torch._modules import Inventory

# What is trained -> how many windows of it had sums in bfloat16.
_WINDOWS: Any = WeakIdKeyDictionary()

# The golden ratio in 32 bits. Multiples of it are far from the seeds that people choose, whose
# numbers would be those of their dropout.
_STEP = 0x9E3779B9


def rounding_seed(accumulator_dtype: str | None, found: Inventory) -> int | None:
    """The seed of the random numbers by which the sums of the next window are rounded.

    It counts the windows of a module: the same program draws the same numbers, on all ranks, and
    each window draws others, or the errors of several windows would point the same way.

    Args:
        accumulator_dtype: as the caller gave it.
        found: what the modules of the window hold.

    Returns:
        The seed; None where sums are float32 or wider.

    Raises:
        ValueError: the dtype is another, or there is nothing that it could be for.
    """
    is_name = accumulator_dtype is None or isinstance(accumulator_dtype, str)
    if not is_name or accumulator_dtype not in (None, "float32", "bfloat16"):
        raise ValueError(
            'accumulator_dtype must be "float32" or "bfloat16", by name. '
            f"Got {accumulator_dtype!r}. Leave it out for float32."
        )
    # An evaluation sums no gradients.
    if accumulator_dtype != "bfloat16" or not torch.is_grad_enabled():
        return None
    if torch.bfloat16 not in {parameter.dtype for parameter in found.parameters}:
        dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in found.parameters})
        raise ValueError(
            'accumulator_dtype="bfloat16" is for parameters of bfloat16. '
            f"Got {' and '.join(dtypes)} only. Leave it out."
        )
    sharded = classes_of("torch.distributed.tensor", "DTensor")
    if any(isinstance(parameter, sharded) for parameter in found.parameters):
        raise ValueError(
            'accumulator_dtype="bfloat16" is for parameters that are whole on each rank. '
            "Got DTensors, such as those of fully_shard, whose sums are sharded as they are. "
            "Leave it out."
        )
    window = _WINDOWS[found.owner] = _WINDOWS.get(found.owner, 0) + 1
    return int(window) * _STEP % 2**32
