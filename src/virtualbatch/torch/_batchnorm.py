"""BatchNorm statistics of a window: the moments of all calls, merged into one momentum update.

Each micro-batch is normalised with its own statistics, as on the replicas of data parallelism. The
running statistics take one update per window, with the moments of all its rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from virtualbatch.torch._commit import Commit
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._unhook import unhook


class _Seen(NamedTuple):
    """Moments of one call of a layer.

    Fields:
        values: the number of values per channel.
        moments: their mean and their unbiased variance; shape (2, channels).
    """

    values: int
    moments: torch.Tensor


class Moments(NamedTuple):
    """Moments of all values of a window in one call of a layer.

    Fields:
        values: the number of values per channel.
        mean: the mean of each channel.
        variance: the unbiased variance of each channel.
    """

    values: int
    mean: torch.Tensor
    variance: torch.Tensor


class MergedStatistics:
    """Records what BatchNorm layers see, for the length of one window.

    While it records, a layer's momentum is 1. The kernel then leaves the moments of the call in
    the running statistics, and reading them there needs no second pass over the inputs. Only one
    window knows the layer's own momentum, so a second window is refused.

    Args:
        layers: modules, each once; those that track statistics are recorded.
        before: their buffers before the window.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], before: Buffers):
        self._before = before
        self._layers: list[Any] = [layer for layer in layers if is_tracked(layer)]
        self._seen: dict[int, list[list[_Seen]]] = {id(layer): [] for layer in self._layers}
        self._calls: dict[int, list[_Seen]] = {}
        self._listening, self._thread = False, 0
        self._parts: MergedStatistics | None = None

    def __bool__(self) -> bool:
        return bool(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listens to the layers inside the context, and leaves no trace on them after it.

        Raises:
            RuntimeError: another window listens to one of them, in this thread or in another.
        """
        hear = self.hear
        momenta: list[tuple[Any, float | None]] = []

        def leave() -> None:
            for layer, momentum in momenta:
                layer.momentum = momentum
            for layer in self._layers:
                unhook(hear, layer._forward_hooks)

        with Undo(leave):
            for layer in self._layers:
                layer.register_forward_hook(hear)
            # Hooks come first and leave last. So a layer without a hook has its own momentum, and
            # two windows that begin at the same time see each other.
            self._refuse_second_window()
            for layer in self._layers:
                momenta.append((layer, layer.momentum))
                layer.momentum = 1.0
            yield

    @contextmanager
    def in_parts(self) -> Iterator["MergedStatistics"]:
        """Records one call of each layer that runs in several parts inside the context.

        Yields:
            The recorder of the parts. Each part is one `forward` of that recorder.

        Raises:
            RuntimeError: another thread is in a forward pass of this window.
        """
        if self._listening and self._thread != get_ident():
            raise _second_window(self._layers[0])
        parts = MergedStatistics(self._layers, self._before)
        with Undo(partial(self._hear_in, None)):
            self._hear_in(parts)
            yield parts
        if not self._listening:
            return
        for layer, calls in zip(self._layers, parts.merged(), strict=True):
            for seen in calls:
                moments = torch.stack((seen.mean, seen.variance))
                self._calls[id(layer)].append(_Seen(seen.values, moments))

    def _hear_in(self, parts: "MergedStatistics | None") -> None:
        self._parts = parts

    def _refuse_second_window(self) -> None:
        for layer in self._layers:
            for listener in listeners(layer):
                if listener is not self:
                    raise _second_window(layer)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Records the forward pass of one micro-batch.

        Calls outside the context are not recorded. Checkpointing makes such calls.

        Raises:
            RuntimeError: a layer was not called as a module.
        """
        self._calls = {id(layer): [] for layer in self._layers}
        versions = [_counted(layer) for layer in self._layers]
        self._listening, self._thread = True, get_ident()
        try:
            yield
        finally:
            self._listening = False
        for layer, version in zip(self._layers, versions, strict=True):
            calls = self._calls[id(layer)]
            if not calls and _counted(layer) != version:
                raise RuntimeError(_UNHEARD)
            for k, seen in enumerate(calls):
                merged = self._seen[id(layer)]
                if k == len(merged):
                    merged.append([])
                merged[k].append(seen)

    def heard(self, loss_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The loss function, with each call recorded as the forward pass of a micro-batch."""

        def listening(microbatch: Any) -> Any:
            with self.forward():
                return loss_fn(microbatch)

        return listening

    def merged(self) -> list[list["Moments"]]:
        """For each layer the moments of all micro-batches, one for each call in a forward pass."""
        coefficients = _Coefficients()
        with torch.no_grad():
            return [
                [_merged(calls, coefficients) for calls in self._seen[id(layer)]]
                for layer in self._layers
            ]

    def prepare(self, commit: Commit, merged: Sequence[Sequence["Moments"]] | None = None) -> None:
        """Prepares one momentum update of each layer per call of a forward pass, in call order.

        Call it after `attached`, when the layers have their own momentum again.

        Args:
            commit: the commit of the window.
            merged: the moments to use, such as those of all replicas; None for what `merged()`
                returns.
        """
        if not self._layers:
            return
        counted: list[torch.Tensor] = []
        with torch.no_grad():
            for layer, calls in zip(self._layers, merged or self.merged(), strict=True):
                buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
                state = [b if b is None else self._before.copy_of(b) for b in buffers]
                for moments in calls:
                    state = _updated(state, (moments.mean, moments.variance), layer.momentum)
                counted += buffers[:2]
                for buffer, value in zip(buffers, state, strict=True):
                    if buffer is not None:
                        commit.statistics(buffer, value)
        # PyTorch's own updates leave the versions of statistics as they are.
        commit.keep_versions(counted)

    def commit(self, merged: Sequence[Sequence["Moments"]] | None = None) -> None:
        """Makes the momentum updates of a window that writes nothing else.

        Args:
            merged: see `prepare`.
        """
        commit = Commit()
        self.prepare(commit, merged)
        with Undo(self._before.restore) as undo:
            commit.run(undo)

    def hear(self, layer: Any, args: Any, output: torch.Tensor) -> None:
        """Records the moments of one call of a layer, which are in its running statistics.

        Args:
            layer: the layer.
            args: what it was called with.
            output: what it returned.
        """
        if self._parts is not None:
            self._parts.hear(layer, args, output)
        elif self._listening and layer.training:
            # One operation copies both: a small layer takes no longer than a few operations.
            moments = torch.stack((layer.running_mean, layer.running_var))
            values = output.numel() // output.shape[1]
            self._calls[id(layer)].append(_Seen(values, moments))


def listeners(layer: torch.nn.Module) -> list[MergedStatistics]:
    """The windows that record a layer."""
    found = [getattr(hook, "__self__", None) for hook in list(layer._forward_hooks.values())]
    return [listener for listener in found if isinstance(listener, MergedStatistics)]


def _second_window(layer: torch.nn.Module) -> RuntimeError:
    return RuntimeError(
        "A BatchNorm layer in training mode must be in one window at a time, because each window "
        f"gives it one momentum update. Got {type(layer).__name__} inside a window that has not "
        "ended. Call backward after that window, give each thread a module of its own, or call "
        "layer.eval()."
    )


_UNHEARD = (
    "BatchNorm layers in training mode must be called as modules, so that their statistics can be "
    "merged. Got one whose statistics changed without such a call. Write layer(x) instead of "
    "layer.forward(x), or call layer.eval()."
)


def is_tracked(module: torch.nn.Module) -> bool:
    return (
        isinstance(module, _BatchNorm)
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
        and module.running_var is not None
    )


def _counted(layer: Any) -> int:
    """How often `num_batches_tracked` was written. The host knows this, but not the value."""
    return 0 if layer.num_batches_tracked is None else layer.num_batches_tracked._version


class _Coefficients:
    """Factors of a merge as tensors. Layers that see the same number of values share them."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[torch.Tensor, ...]] = {}

    def of(self, counts: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each call: its part of all values, and its factors for variance and distance."""
        key = (counts, like.device, like.dtype)
        if key not in self._known:
            total = sum(counts)
            table = [
                [n / total for n in counts],
                [(n - 1) / (total - 1) for n in counts],
                [n / (total - 1) for n in counts],
            ]
            # From pinned memory the copy does not make the host wait for the end of the window.
            host = torch.tensor(table, dtype=like.dtype, pin_memory=like.is_cuda)
            columns = host.to(like.device, non_blocking=True)
            self._known[key] = tuple(columns[:, :, None])
        return self._known[key]


def _merged(calls: Sequence[_Seen], coefficients: _Coefficients) -> Moments:
    """Moments of all values that the calls saw.

    All groups are known, so they are merged at once around the common mean. `merge_moments` merges
    pair by pair. The result is the same, with a tenth of the kernels.
    """
    counts = tuple(seen.values for seen in calls)
    if len(calls) == 1:
        mean, variance = calls[0].moments
        return Moments(counts[0], mean, variance)
    wide = torch.promote_types(calls[0].moments.dtype, torch.float32)
    means, variances = torch.stack([seen.moments for seen in calls], 1).to(wide)
    part, within, between = coefficients.of(counts, means)
    # Not a matrix product, which may be rounded to ten bits.
    mean = (part * means).sum(0)
    variance = (within * variances + between * (means - mean) ** 2).sum(0)
    return Moments(sum(counts), mean, variance)


def _updated(state: Sequence[Any], found: Sequence[torch.Tensor], momentum: float | None) -> Any:
    """Running mean, running variance and their count after one update with the found moments."""
    *running, count = state
    count = None if count is None else count + 1

    def moved(before: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        if momentum is not None:
            return before.lerp(found.to(before.dtype), momentum)
        # The count stays on its device: reading it would wait for the window.
        return before if count is None else before + (found - before) / count

    return [*map(moved, running, found), count]
