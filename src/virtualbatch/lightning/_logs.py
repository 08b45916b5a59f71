"""Values that `self.log` gets for micro-batches, logged once for the whole batch."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any, NamedTuple

import torch

from virtualbatch.lightning._pieces import Counts, Piece, counts, mean, together


class _Told(NamedTuple):
    """One call of `self.log` for one micro-batch.

    Fields:
        arguments: the arguments of the call, by name.
        counts: the weights of the micro-batch.
    """

    arguments: dict[str, Any]
    counts: Counts

    @property
    def value(self) -> Any:
        return self.arguments["value"]


class Logs:
    """Records calls of `self.log` during a window.

    If a value equals the loss in every micro-batch, it is averaged like the loss. `reduce_fx` may
    ask for a sum, minimum or maximum. Any other value is averaged by the `batch_size` of its call,
    or by rows. A metric is logged unchanged, because it has counted all rows by then.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: Any):
        self._module = module
        self._log: Callable[..., Any] = module.log
        self._signature = inspect.signature(self._log)
        self._open: list[dict[str, Any]] = []
        # (name, number of its call in the step) -> one entry per micro-batch.
        self._told: dict[tuple[str, int], list[_Told]] = {}

    @contextmanager
    def instead_of_log(self) -> Iterator[None]:
        """Records what the module logs, also with `self.log_dict`, which calls `self.log`."""
        before = vars(self._module).get("log")
        self._module.log = self.hear
        try:
            yield
        finally:
            del self._module.log
            if before is not None:
                self._module.log = before

    def hear(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the arguments of a call until the micro-batch has run."""
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if arguments.get("enable_graph"):
            raise ValueError(
                "A window logs values without their graph, which would keep all activations. "
                f"Got self.log({arguments['name']!r}, ..., enable_graph=True). Leave it out."
            )
        value = arguments["value"]
        if isinstance(value, torch.Tensor):
            # Copy it, because it may be changed in place later.
            arguments["value"] = value.detach().clone()
        self._open.append(arguments)

    def close(self, piece: Piece) -> None:
        """Ends a micro-batch: assigns its recorded calls to its weights."""
        if not self._open:
            return
        of_piece = counts(piece)
        calls: dict[str, int] = {}
        for arguments in self._open:
            name = arguments["name"]
            calls[name] = calls.get(name, 0) + 1
            self._told.setdefault((name, calls[name]), []).append(_Told(arguments, of_piece))
        self._open = []

    def clear(self) -> None:
        """Forgets everything."""
        self._open, self._told = [], {}

    def tell(self, rows: int | None) -> None:
        """Logs the values of the window.

        Args:
            rows: rows of a window of several batches, because Lightning sees only the last batch.
                None if the window is one batch.
        """
        for told in self._told.values():
            arguments = dict(told[-1].arguments)
            sizes: list[Any] = [each.arguments.get("batch_size") for each in told]
            if None not in sizes:
                arguments["batch_size"] = int(sum(sizes))
            elif rows is not None:
                arguments["batch_size"] = rows
            if len(told) > 1 and all(_is_number(each.value) for each in told):
                arguments["value"] = _combined(told, sizes)
            self._log(**arguments)


def _is_number(value: Any) -> bool:
    is_tensor = isinstance(value, torch.Tensor)
    return value.numel() == 1 if is_tensor else isinstance(value, Number)


def _combined(told: Sequence[_Told], sizes: Sequence[Any]) -> torch.Tensor:
    values = [x.reshape(()) if isinstance(x, torch.Tensor) else x for x in (t.value for t in told)]
    losses = [each.counts.loss for each in told]
    like = losses[0]
    weighing = [each.counts.by_rows for each in told] if None in sizes else sizes
    combined = _reduced(values, told[-1].arguments.get("reduce_fx", "mean"), weighing, like)
    by_weight = [each.counts.by_weight for each in told]
    of_loss = together(losses, like).sum() if None in by_weight else mean(losses, by_weight, like)
    # Compare values, because many users log `loss.item()` or a copy. This stays on the device.
    is_loss = torch.isclose(
        together(values, like), together(losses, like), rtol=0.0, atol=0.0, equal_nan=True
    ).all()
    return torch.where(is_loss, of_loss, combined).to(_dtype(values[0]))


def _reduced(
    values: Sequence[Any], reduce_fx: Any, weighing: Sequence[Any], like: torch.Tensor
) -> torch.Tensor:
    match reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", ""):
        case "sum":
            return together(values, like).sum()
        case "min":
            return together(values, like).min()
        case "max":
            return together(values, like).max()
        case _:
            return mean(values, weighing, like)


def _dtype(value: Any) -> torch.dtype:
    """The dtype in which Lightning would have kept the value."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.dtype
    default = torch.get_default_dtype()
    return default if default.itemsize >= torch.float32.itemsize else torch.float32
