"""Random numbers kept by row.

Dropout draws one number per element, in the order of the batch. In micro-batches the same rows
would draw other numbers.
"""

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from virtualbatch.certify.randomness import axes_of_rows


class RowwiseRandom(TorchDispatchMode):
    """Keeps random numbers by row, or gives constants where numbers do not belong to rows.

    Args:
        rows: rows of the whole batch.
    """

    def __init__(self, rows: int):
        super().__init__()
        self._rows = rows
        self._kept: list[torch.Tensor] = []
        self._axes: list[int | None] = []
        self._probe: list[torch.Size] = []
        self._chosen: torch.Tensor | None = None
        # The generator's state before a draw -> the number of the draw.
        self._seen: dict[bytes, int] = {}
        self._phase = "probe"
        # Floating dtypes of all results.
        self.dtypes: set[torch.dtype] = set()

    @property
    def draws(self) -> int:
        """How many times the whole batch draws."""
        return len(self._kept)

    def probe(self) -> None:
        """Only records shapes in the next run, which is on fewer rows than the batch has."""
        self._phase, self._probe = "probe", []

    def keep(self) -> None:
        """Keeps what the next run draws, which is on the whole batch."""
        self._phase, self._kept = "keep", []

    def learn(self, some: int) -> bool:
        """Finds the axis of rows in every draw, from the last two runs.

        Args:
            some: the number of rows of the run that only recorded shapes.

        Returns:
            Whether random numbers can be chosen by row. If not, constants are given from now on.
        """
        whole = [kept.shape for kept in self._kept]
        try:
            self._axes = axes_of_rows(whole, self._probe, self._rows, some)
        except ValueError:
            self._phase = "constant"
            return False
        self._phase = "replay"
        return True

    def choose(self, rows: torch.Tensor | np.ndarray) -> None:
        """Sets which rows of the batch run next."""
        on_host = isinstance(rows, np.ndarray)
        self._chosen = torch.as_tensor(np.ascontiguousarray(rows)) if on_host else rows
        self._seen = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                self.dtypes.add(result.dtype)
            return result
        before = _generator_state(args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        drawn = result[1] if isinstance(result, tuple) else result
        if not isinstance(drawn, torch.Tensor) or not _draws(func, args, kwargs or {}):
            return result
        if self._phase == "probe":
            self._probe.append(drawn.shape)
        elif self._phase == "keep":
            self._kept.append(drawn.clone())
        elif self._phase == "constant":
            drawn.copy_(_constant(func, drawn))
        else:
            drawn.copy_(_within(func, args, kwargs or {}, self._of_rows(func, drawn, before)))
        if func.overloadpacket is torch.ops.aten.native_dropout:
            p = args[1]
            result[0].copy_(args[0] * drawn / (1 - p))
        return result

    def _of_rows(self, func: Any, drawn: torch.Tensor, before: bytes) -> torch.Tensor:
        # Checkpointing computes a forward pass again, from the generator state that it had before.
        index = self._seen.setdefault(before, len(self._seen))
        kept, axis = self._kept[index], self._axes[index]
        if axis is None or self._chosen is None:
            return kept.expand_as(drawn)
        if func.overloadpacket is torch.ops.aten.randperm:
            # A permutation of all rows is none of some rows. Any order but the identity shows
            # whether rows are coupled.
            return _backwards(drawn)
        each = kept.shape[axis] // self._rows
        rows = self._chosen.to(kept.device)
        places = (rows[:, None] * each + torch.arange(each, device=kept.device)).reshape(-1)
        return kept.index_select(axis, places)


def _generator_state(args: Any, kwargs: Any) -> bytes:
    """The state of the generator that an operation draws from."""
    device = kwargs.get("device")
    if device is None:
        tensors = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        device = next((x.device for x in tensors), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cpu":
        return torch.get_rng_state().numpy().tobytes()
    return torch.get_device_module(device).get_rng_state().numpy().tobytes()


def _constant(func: Any, drawn: torch.Tensor) -> torch.Tensor:
    """The constants that replace numbers which cannot be kept by row."""
    if func.overloadpacket is torch.ops.aten.randperm:
        return _backwards(drawn)
    ones = "bernoulli" in func.name() or "dropout" in func.name()
    return torch.full_like(drawn, 1 if ones else 0.5)


def _backwards(drawn: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(drawn), device=drawn.device).flip(0)


def _within(func: Any, args: Any, kwargs: Any, kept: torch.Tensor) -> torch.Tensor:
    """Integers that were drawn for the whole batch, moved into the bounds of the present run.

    A loss function that draws row numbers has smaller bounds when it runs on fewer rows.
    """
    given = _named(func, args, kwargs)
    if func.overloadpacket is torch.ops.aten.multinomial:
        return kept % args[0].shape[-1]
    low, high = given.get("low", given.get("from", 0)), given.get("high", given.get("to"))
    if kept.is_floating_point() or high is None:
        return kept
    return low + (kept - low) % (high - low)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation really draws; attention without dropout does not."""
    return bool(_named(func, args, kwargs).get("dropout_p", 1.0) != 0.0)
