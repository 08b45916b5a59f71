"""The messages between the ranks of a window: small vectors of numbers, never a pickle.

Before the first micro-batch the ranks add up their weights, and form shares of the sums. After the
last micro-batch, before anything is written, they exchange whether all have succeeded. So all ranks
know of a failed rank, and none waits for gradients that will not come.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from virtualbatch.torch._conclusion import Ran
from virtualbatch.torch._distributed import full
from virtualbatch.torch._replicas.moments import as_sums, from_sums
from virtualbatch.torch._replicas.replicas import Outcome
from virtualbatch.window.weights import HostWeights, Totals

# All ranks send equally many numbers. A rank without rows does not know the terms.
_MOST_TERMS = 56
# From narrow to wide: the loss of the window has the widest dtype of all ranks.
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Whether a rank has failed, the count of micro-batches, dtypes, the loss, the mean square.
_NUMBERS = 4 + len(_DTYPES)


class Agreement:
    """The messages of one window. As a context, it tells the other ranks of errors inside.

    Args:
        group: the process group of the ranks.
        device: the device of the module, on which the loss is returned.
        parameters: the number of parameters, the same on all ranks.
        channels: the channels of each BatchNorm layer whose statistics are merged, the same on all
            ranks.
        in_step: whether ranks run each micro-batch at the same time. Then a failure cannot be
            sent while they run, because they wait in gathers of their module.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        parameters: int,
        channels: Sequence[int],
        in_step: bool = False,
    ):
        self._group = group
        self._size = distributed.get_world_size(group)
        self._device = device
        self._parameters = parameters
        self._channels = channels
        # Gloo sends from the host. NCCL sends only from a device.
        backends = str(distributed.get_backend_config(group))
        self._messages = torch.device("cpu") if "cpu:" in backends else device
        self._in_step = in_step
        # Sends the message that the other ranks wait for, and tells them of a failure by it.
        self._tell: Callable[[], Any] | None = self._tell_before
        if in_step:
            self._tell = self._tell_count

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._tell is None:
            return
        try:
            self._tell()
        except RuntimeError as lost:
            error.add_note(f"The other ranks could not be notified: {lost}")

    def most(self, count: int) -> int:
        """The largest number of micro-batches that a rank needs. All ranks must run so many.

        Args:
            count: the number that this rank needs.

        Raises:
            RuntimeError: another rank has failed.
        """
        failed, most = self._largest([0, count])
        self._tell = None
        self._check_others(failed)
        self._tell = self._tell_before
        return most

    def have_run(self) -> None:
        """Records that all micro-batches of ranks in step have run."""
        self._tell = self._tell_after

    def before(self, weights: HostWeights) -> Totals:
        """Adds up the weights of the window over all ranks.

        Args:
            weights: the weights of this rank's micro-batches.

        Raises:
            ValueError: a weight is not valid, no rank has a row, or ranks have different terms.
            RuntimeError: another rank has failed.
        """
        names = sorted(weights.weighed, key=str)
        if len(names) > _MOST_TERMS:
            raise ValueError(
                f"A loss of several ranks may have at most {_MOST_TERMS} weights. Got "
                f"{len(names)}. Add up the terms that have the same weight."
            )
        # Refuses weights that are not valid, before they are added to those of other ranks.
        weights.shares()
        has_rows = bool(weights.rows)
        code = float(_code(weights)) if has_rows else 0.0
        rows = float(sum(n or 0 for n in weights.rows))
        own = [float(has_rows), code, code**2, rows, float(len(weights.rows))]
        own += [float(None in weights.rows), *(math.fsum(weights.weighed[name]) for name in names)]
        # If this message itself fails, it must not be sent again.
        self._tell = None
        failed, ranks, codes, squares, rows, count, unknown, *sums = self._sum_weights([0.0, *own])
        self._check_others(failed)
        if not ranks:
            raise ValueError(
                f"A window must have a row on at least one rank. Got none on any of {self._size} "
                "ranks. Skip it on all ranks."
            )
        if not is_common(ranks, codes, squares):
            here = ", ".join(map(str, weights.terms)) if weights.terms else "no named terms"
            raise ValueError(
                "All ranks must return the same terms. "
                f"Got {here} here. Make loss_fn and weight the same on all ranks."
            )
        self._tell = None if self._in_step else self._tell_after
        terms = dict(zip(names, sums, strict=False))
        return Totals(count, terms, len(weights.rows)) if unknown else Totals(rows, terms)

    def after(self, ran: Ran) -> Outcome:
        """Checks that all ranks have succeeded, and adds up all results but the gradients.

        Args:
            ran: the window as it ran on this rank.

        Raises:
            RuntimeError: another rank has failed.
        """
        merged = ran.loop.statistics.merged()
        calls: list[int] = []
        if self._channels:
            # A layer may be called a different number of times on each rank. The largest counts.
            own = [0, *map(len, merged)]
            self._tell = None
            failed, *calls = self._largest(own)
            self._check_others(failed)
        loss, norms = ran.loss, ran.loop.norms
        numbers = [
            torch.tensor([0.0, float(ran.shares.counted)]),
            torch.tensor([float(loss.dtype == dtype) for dtype in _DTYPES]),
            torch.zeros(()) if loss.total is None else full(loss.total),
            torch.zeros(()) if norms is None else norms.mean_square(),
            torch.tensor(ran.reached(self._parameters)),
            *as_sums(merged, calls, self._channels),
        ]
        self._tell = None
        sums = self._sum(numbers)
        known = sums[: _NUMBERS + self._parameters].tolist()
        self._check_others(known[0])
        dtypes = [dtype for dtype, ranks in zip(_DTYPES, known[2:], strict=False) if ranks]
        loss_at = 2 + len(_DTYPES)
        return Outcome(
            sums[loss_at].to(self._device, dtypes[-1] if dtypes else torch.get_default_dtype()),
            list(map(bool, known[_NUMBERS:])),
            round(known[1]),
            sums[loss_at + 1].to(self._device),
            from_sums(sums[_NUMBERS + self._parameters :].to(self._device), calls, self._channels),
        )

    def _tell_count(self) -> None:
        self._largest([1, 0])

    def _tell_before(self) -> None:
        self._sum_weights([1.0])

    def _tell_after(self) -> None:
        if self._channels:
            self._largest([1] + [0] * len(self._channels))
        else:
            self._sum([torch.tensor([1.0] + [0.0] * (_NUMBERS + self._parameters - 1))])

    def _sum_weights(self, own: Sequence[float]) -> list[float]:
        vector = torch.zeros(_MOST_TERMS + 8, dtype=torch.float64)
        vector[: len(own)] = torch.tensor(own, dtype=torch.float64)
        found: list[float] = self._sum([vector]).tolist()
        return found

    def _sum(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        wide = [part.detach().to(self._messages, torch.float64).flatten() for part in parts]
        vector = torch.cat(wide)
        distributed.all_reduce(vector, group=self._group)
        return vector

    def _largest(self, own: Sequence[int]) -> list[int]:
        vector = torch.tensor(own, dtype=torch.int32, device=self._messages)
        distributed.all_reduce(vector, distributed.ReduceOp.MAX, group=self._group)
        found: list[int] = vector.tolist()
        return found

    def _check_others(self, failed: float) -> None:
        if failed:
            raise RuntimeError(
                "Another rank failed in this window. "
                f"Got an error on another of {self._size} ranks; nothing of this window was "
                "applied here. See the log of that rank."
            )


def is_common(count: float, total: float, squares: float) -> bool:
    """Whether all codes are equal, judged by their sum and the sum of their squares.

    Sums of 16-bit codes are exact. So each of the two products has only one rounding error.

    Args:
        count: the number of codes.
        total: the sum of the codes.
        squares: the sum of their squares.
    """
    return abs(squares * count - total**2) <= 1e-15 * total**2


def _code(weights: HostWeights) -> int:
    """A number that is equal on ranks with the same terms."""
    weighed = weights.weighed
    terms = weights.terms and sorted(
        (str(name), "" if name in weighed else str(kind)) for name, kind in weights.terms.items()
    )
    return 1 + zlib.crc32(repr((terms, weights.is_sum)).encode()) % 2**16
