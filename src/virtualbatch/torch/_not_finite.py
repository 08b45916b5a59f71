"""Detects losses that are not finite, without waiting for a device."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.window.not_finite import LateLosses, LossWatch


class Heard(NamedTuple):
    """The losses of a window, as detached scalars.

    Fields:
        total: the loss of the window.
        parts: (number of the micro-batch, name of the term, its loss), for all terms that count.
        rows: the rows of each micro-batch; None where they are not known.
        what: a name for the numbers if they are not losses; None for losses.
        before: an earlier scalar. If it is not finite, the total is not judged. None for no such
            scalar.
    """

    total: torch.Tensor
    parts: Sequence[tuple[int, Any, torch.Tensor]]
    rows: Sequence[int | None]
    what: str | None = None
    before: torch.Tensor | None = None

    @property
    def scalars(self) -> list[torch.Tensor]:
        """The total, then `before` if there is one, then the parts."""
        before = [] if self.before is None else [self.before]
        return [self.total, *before, *(loss for _, _, loss in self.parts)]


class _Sent(NamedTuple):
    """The losses of a window on their way to the host.

    Fields:
        values: the scalars as a vector.
        event: an event of the device, reached once the values have arrived; None if the device has
            no events.
        of: the losses that were sent.
    """

    values: torch.Tensor
    event: Any
    of: Heard


class ModuleLosses:
    """Receives the losses of one module's windows."""

    def __init__(self) -> None:
        self._watch = LossWatch()
        self._late: LateLosses[_Sent] = LateLosses(_is_there, self._hear_sent)

    def take(self, found: Heard) -> None:
        """Takes the losses of a window that has succeeded."""
        total = found.total
        # A fake or meta tensor has no value, and a DTensor is only a part.
        if type(total) is not torch.Tensor or total.is_meta:
            return
        if _is_on_host(total):
            # Reading memory of the host waits for nothing. `item` is not used, because some tools
            # refuse it: they take it for a wait for a device.
            self._hear(found, float(total.numpy()), None)
        elif not (total.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._late.take(_sent(found))

    def _hear_sent(self, sent: _Sent) -> None:
        values = sent.values.tolist()
        self._hear(sent.of, values[0], values)

    def _hear(self, found: Heard, total: float, values: Sequence[float] | None) -> None:
        if found.before is not None:
            before = found.before.item() if values is None else values[1]
            if not math.isfinite(before):
                return
        if not self._watch.listens(total):
            return
        if values is None:
            losses = [loss.item() for _, _, loss in found.parts]
        else:
            losses = list(values[len(values) - len(found.parts) :])
        terms: list[dict[Any, float]] = [{} for _ in found.rows]
        for (index, name, _), loss in zip(found.parts, losses, strict=True):
            terms[index][name] = loss
        self._watch.hear(terms, found.rows, found.what)


def _sent(found: Heard) -> _Sent:
    """Sends losses to the host."""
    total = found.total
    with torch.no_grad():
        values = torch.stack([x.to(total) for x in found.scalars])
        if not total.is_cuda:
            return _Sent(values, None, found)
        there = torch.empty_like(values, device="cpu", pin_memory=True)
        there.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(total.device))
    return _Sent(there, event, found)


def _is_on_host(total: torch.Tensor) -> bool:
    return total.device.type == "cpu"


def _is_there(sent: _Sent, is_latest: bool) -> bool:
    if sent.event is None:
        # Reading waits for the device, and leaves it idle unless a later window keeps it busy.
        return not is_latest
    found: bool = sent.event.query()
    return found
