"""What the `train_step` of every backend shares: sizes, refusals and log lines."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from virtualbatch.certify.proven import Proven
from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._checks import refuse_accumulating_optimizer
from virtualbatch.keras._gather.detection import Evaluate, found_by_shape, found_on_rows
from virtualbatch.keras._gather.gathering import EVERYTHING, NOTHING, Found, Gathering
from virtualbatch.keras._gather.said import say_what_is_gathered, say_what_is_not_gathered
from virtualbatch.keras._not_finite import without_losses
from virtualbatch.keras._packing import Packing
from virtualbatch.plan.auto import is_automatic
from virtualbatch.window.cut import rows_per_microbatch

_log = logging.getLogger("virtualbatch")

# The key under which the logs of a step hold statistics for its listener, until `told` removes it.
STATS = "virtualbatch_stats"


class TrainStep:
    """The `train_step` of a model that accumulates, without the call itself.

    Args:
        model: the model.
        microbatch_size: rows of one micro-batch, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.
        packing: how rows are packed instead, or None.
        check: whether the first window is checked; see `prove_first_window`.
        gather: which losses get the predictions of all rows: those that need them (None), all
            (True) or none (False). Or a `Found`, if that is known already.

    Attributes:
        microbatch_size: as given.
        packing: as given.
        check: as given.
        gather: as given.
        silent: whether to log nothing about losses that return one number, because they were
            proven or are being observed.
        most: rows of a micro-batch, or tokens of a packed one, if that number was planned or
            reduced after memory ran out; else None.
        losses: receives the losses of windows; None if they are not watched.
        listener: receives the `WindowStats` of windows. If it is None, they are not computed. A
            train function keeps the listener that was set when it was made.
    """

    is_virtualbatch = True

    def __init__(
        self,
        model: keras.Model,
        microbatch_size: Any,
        accumulation_steps: int | None,
        packing: Packing | None = None,
        check: bool = False,
        gather: bool | Found | None = None,
    ):
        self._model = model
        self.microbatch_size = microbatch_size
        self.packing = packing
        self.check = check
        self.gather = gather
        self.silent = False
        self._accumulation_steps = accumulation_steps
        self.most: int | None = None
        self.listener: Callable[[Any], None] | None = None
        self._said: set[str] = set()
        self._proven, self._compiled = Proven(), model._compile_loss
        # The first was found from values, the second from shapes alone.
        self._found: Found | None = None
        self._assumed: Found | None = None
        self._added = AddedLosses()
        self._said_how_it_is_cut = False
        self.losses: Any = self._losses()

    def proven(self) -> Proven:
        """What the checks have proven since the model was last compiled."""
        self._forget_if_recompiled()
        return self._proven

    def look_for_coupled(self, batch: Any, rows: int, evaluate: Evaluate) -> bool:
        """Finds, once, which losses need all rows, and logs it.

        Args:
            batch: (x, y, sample_weight); every array has values.
            rows: its rows.
            evaluate: see `virtualbatch.keras._gather.detection.Evaluate`.

        Returns:
            Whether programs that were made before are outdated.
        """
        if self.is_known() or rows < 2:
            return False
        assumed, self._assumed = self._assumed, None
        self._found = found_on_rows(self._model, batch, rows, evaluate)
        if assumed is not None and assumed.gathering == self._found.gathering:
            return False
        self.say_what_was_found(self._found)
        return assumed is not None

    def found(self, batch: Any) -> Found:
        """The losses that need all rows and get them, judged by shape if no values were read.

        Args:
            batch: (x, y, sample_weight), perhaps without values.
        """
        if isinstance(self.gather, Found):
            return self.gather
        if self.gather:
            return Found([], EVERYTHING)
        if self.is_known():
            found = self._found
        else:
            # The values of a later batch may show more, so this is only assumed.
            if self._assumed is None:
                self._assumed = found_by_shape(self._model, batch)
                self.say_what_was_found(self._assumed)
            found = self._assumed
        return NOTHING if found is None or self.gather is False else found

    def gathering(self, batch: Any) -> Gathering | None:
        """What a window of several micro-batches gathers; None if it gathers nothing.

        Args:
            batch: (x, y, sample_weight), perhaps without values.

        Raises:
            ValueError: a listener wants statistics, but a loss sees all rows.
        """
        found = self.found(batch).gathering
        if found is not None and self.listener is not None:
            raise ValueError(
                "stats needs a loss that is a mean over rows. Got a loss that sees all rows. "
                "Leave NoiseScale out, or pass gather=False to accumulate."
            )
        return found

    def is_known(self) -> bool:
        """Whether it is known for good which losses need all rows."""
        self._forget_if_recompiled()
        return self._found is not None or self.gather is True or isinstance(self.gather, Found)

    def say_what_was_found(self, found: Found) -> None:
        """Logs whose predictions are gathered, or should be."""
        if self.gather is False:
            say_what_is_not_gathered(self._model, found)
        else:
            say_what_is_gathered(self._model, found)

    def _forget_if_recompiled(self) -> None:
        if self._compiled is not self._model._compile_loss:
            self._proven, self._compiled = Proven(), self._model._compile_loss
            self._found, self._assumed, self.silent = None, None, False

    def rows_asked_for(self, rows: int) -> int:
        """The rows, or tokens, of a micro-batch that the user asked for.

        Args:
            rows: the rows of the batch.
        """
        if self.packing is not None:
            return self.packing.tokens
        if self.microbatch_size is not None:
            return int(self.microbatch_size)
        return int(rows_per_microbatch(rows, None, self._accumulation_steps))

    def told(self, logs: dict[str, Any]) -> dict[str, Any]:
        """The logs of a step as Keras expects them; listeners get the other entries."""
        stats = logs.pop(STATS, None)
        if stats is not None and self.listener is not None:
            self.listener(stats)
        return without_losses(logs) if self.losses is None else self.losses.told(logs)

    def say_how_it_is_cut(self, rows: int) -> None:
        """Warns at the first batch if the user seems to mean something else by `batch_size`.

        In other tools `batch_size` is the number of rows that go through the model at once, and an
        accumulation factor multiplies it.

        Args:
            rows: the rows of the batch on one device.
        """
        if self._said_how_it_is_cut:
            return
        self._said_how_it_is_cut = True
        size, steps = self._asked()
        devices = self._devices()
        if steps is None and size is not None and size >= rows and self.packing is None:
            _log.warning(
                "A batch of %d rows is one micro-batch of microbatch_size=%d%s, so nothing is "
                "accumulated. One batch of fit is one update: did you mean fit(batch_size=%d)?",
                *(rows * devices, size, _on_each(devices), 4 * size * devices),
            )
        elif size is None and steps is not None and steps > 1:
            size = int(rows_per_microbatch(rows, None, steps))
            whole = rows * devices
            _log.warning(
                "A batch of %d rows is one update of %d micro-batches of up to %d rows%s. If all "
                "%d rows fit in memory at once, did you mean fit(batch_size=%d)? Otherwise pass "
                "microbatch_size=%d instead of accumulation_steps=%d, which also stops this "
                "message.",
                *(whole, -(-rows // size), size, _on_each(devices)),
                *(whole, whole * steps, size, steps),
            )

    def _losses(self) -> Any:
        """What receives the losses of windows, without waiting for a device."""
        raise NotImplementedError

    def _devices(self) -> int:
        """The number of devices over which the rows of a batch are spread."""
        return 1

    def _asked(self) -> tuple[int | None, int | None]:
        """(microbatch_size, accumulation_steps) as given; (None, None) if the size is planned."""
        if is_automatic(self.microbatch_size):
            return None, None
        return self.microbatch_size, self._accumulation_steps

    def _in_force(self, rows: int, asked: int | None) -> int:
        """The rows of a micro-batch that are used now.

        Args:
            rows: the rows of the batch.
            asked: rows of a micro-batch that the user asked for; None if they are planned.

        Raises:
            ValueError: the size must be planned, but no plan was made.
        """
        if self.most is not None:
            return min(self.most, rows if asked is None else asked)
        if asked is None:
            raise ValueError(
                'microbatch_size="auto" is planned by fit and train_on_batch. '
                "Got a call of train_step itself. Call plan, and accumulate with what it finds."
            )
        return asked

    def _packing_in_force(self) -> Packing | None:
        """How rows are packed, with the number of tokens that is used now."""
        if self.packing is None or self.most is None:
            return self.packing
        return self.packing._replace(tokens=self.most)

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        """(x, y, sample_weight) of a batch, after the optimizer is checked again.

        Raises:
            ValueError: since `accumulate`, the model was given an optimizer that accumulates by
                itself.
        """
        refuse_accumulating_optimizer(self._model.optimizer)
        return keras.utils.unpack_x_y_sample_weight(data)

    def _say(self, losses: list[str]) -> None:
        """Logs losses that return one number, each once per call of `accumulate`."""
        if self.silent:
            return
        for name in losses:
            if name not in self._said:
                _log.warning(
                    "The loss %s returns one number: it is treated as one mean over rows.", name
                )
        self._said.update(losses)


def _on_each(devices: int) -> str:
    return f" on each of {devices} devices" if devices > 1 else ""


@contextmanager
def compiled(model: keras.Model, mode: bool) -> Iterator[bool]:
    """Sets `jit_compile` of a model for the length of a context.

    Args:
        model: the model.
        mode: the value inside the context.

    Yields:
        Whether Keras accepts that value for this model.
    """
    before = model.jit_compile
    try:
        with warnings.catch_warnings():
            # If XLA does not support a layer, Keras warns and leaves the mode off.
            warnings.simplefilter("ignore")
            model.jit_compile = mode
        yield model.jit_compile is mode
    finally:
        model.jit_compile = before
