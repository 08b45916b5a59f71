"""`accumulator_dtype`: whether gradients are summed in bfloat16, and rounded from which seed."""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from virtualbatch.torch._distributed import classes_of
from virtualbatch.torch._modules import Inventory

# What is trained -> the number of its windows with sums in bfloat16.
_WINDOWS: Any = WeakIdKeyDictionary()

# The golden ratio in 32 bits. Its multiples are far from the seeds that people choose. With such a
# seed, rounding would draw the same numbers as dropout.
_STEP = 0x9E3779B9


def rounding_seed(accumulator_dtype: str | None, found: Inventory) -> int | None:
    """The seed of the random numbers by which the sums of the next window are rounded.

    The seed depends only on the number of the window. So the same program draws the same numbers,
    on all ranks. Each window draws other numbers, because otherwise the errors of several windows
    would point the same way.

    Args:
        accumulator_dtype: as the caller gave it.
        found: what the modules of the window hold.

    Returns:
        The seed; None where sums are float32 or wider.

    Raises:
        ValueError: the dtype is not one of the two, or no parameter can use bfloat16 sums.
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
    return (_WINDOWS.get(found.owner, 0) + 1) * _STEP % 2**32


class RoundedWindow:
    """The place of a window with rounded sums in the count of its module.

    Args:
        owner: see `Inventory`.
    """

    def __init__(self, owner: Any):
        self._owner = owner
        self._before = _WINDOWS.get(owner, 0)

    def count(self) -> None:
        """Counts this window, so that the next one draws other numbers."""
        _WINDOWS[self._owner] = self._before + 1

    def restore(self) -> None:
        """Removes this window from the count."""
        _WINDOWS[self._owner] = self._before
