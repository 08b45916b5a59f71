"""Plans the size of windows before they run, and runs a window again if memory runs out.

The train step holds the size in use. A guard changes it between two attempts at the same batch,
after it has put back everything that the failed attempt wrote.
"""

import sys
import traceback
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import keras

from virtualbatch.keras._train_step import TrainStep
from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.retry import Memory, run_until_it_fits
from virtualbatch.plan.signature import Leaf, Signature
from virtualbatch.window.fingerprint import fingerprint
from virtualbatch.window.tree import array_leaves


class Guard:
    """The sizes of one model's windows.

    Args:
        model: the model.
        step: its train step.
        memory: the backend's out-of-memory errors and its measure of free memory.
    """

    def __init__(self, model: keras.Model, step: TrainStep, memory: Memory):
        self._model = model
        self._step = step
        self._memory = memory
        given = step.microbatch_size
        self._sizes = given if isinstance(given, Auto) else Auto()
        self._fitted: set[Hashable] = set()
        self._latest: CurrentSize | None = None
        self._program = ""

    def fitted(self, shape: Hashable) -> bool:
        """Whether a window of this shape has run with the size in use."""
        return shape in self._fitted

    def forget(self) -> None:
        """Forgets the shapes that fitted, because the model computes something else now."""
        self._fitted = set()

    def remember(self, shape: Hashable) -> None:
        """Remembers that a window of this shape has run with the size in use."""
        self._fitted.add(shape)

    def succeeded(self) -> bool:
        """Counts a window that fitted. Returns whether the size grew, so programs are outdated."""
        size = self._latest
        if size is None:
            return False
        size.succeeded()
        return self._take(size)

    def run(
        self,
        batch: Any,
        rows: int,
        attempt: Callable[[], Any],
        put_back: Callable[[], None],
        make_again: Callable[[], None],
        plan: Callable[[int | str | None], Plan],
        prove: Callable[[int], None],
        look_for_coupled: Callable[[], bool],
    ) -> Any:
        """Runs a window. While memory runs out, runs it again with smaller micro-batches.

        Args:
            batch: the batch, or the largest of the batches that run in one call.
            rows: its rows on one device.
            attempt: runs the window once and waits for it.
            put_back: undoes everything that a failed attempt wrote.
            make_again: makes a program for another size.
            plan: memory limit -> plan for this batch.
            prove: rows, or tokens, of a micro-batch -> nothing. Checks, once, that micro-batches
                of this batch add up to the batch.
            look_for_coupled: finds the losses that need all rows. Returns whether the program is
                outdated; see `TrainStep`.

        Raises:
            MemoryError: not even a micro-batch of one row fits.
        """
        self._step.say_how_it_is_cut(rows)
        outdated = False
        if is_automatic(self._step.microbatch_size):
            found = self._signature(batch, rows)
            outdated = look_for_coupled()
            size = self._sizes.planned(found, lambda: plan(self._sizes.memory_limit))
        else:
            size = self._sizes.asked(self._step.rows_asked_for(rows))
        self._latest = size
        if self._step.packing is not None or size.rows < rows:
            outdated = look_for_coupled() or outdated
        if self._take(size) or outdated:
            make_again()
        prove(size.rows)

        def smaller(_: int) -> None:
            self._take(size)
            # This was not done before if the batch was one micro-batch.
            look_for_coupled()
            make_again()

        packed = self._step.packing is not None
        return run_until_it_fits(
            lambda _: attempt(),
            None,
            lambda _: size.rows if packed else min(size.rows, rows),
            smaller,
            size,
            self._memory,
            partial(_largest, self._model),
            put_back=put_back,
            is_too_late=partial(_has_moved, self._model),
            unit="tokens" if packed else "rows",
        )

    def _take(self, size: CurrentSize) -> bool:
        """Sets the size in use. Returns whether it changed."""
        planned = is_automatic(self._step.microbatch_size)
        most = size.rows if planned or size.rows < size.most else None
        changed = most != self._step.most
        if changed:
            self._step.most = most
            self._fitted = set()
        return changed

    def _signature(self, batch: Any, rows: int) -> Signature:
        arrays = list(array_leaves(batch))
        if not self._program:
            variables = ", ".join(
                f"{variable.dtype}{list(variable.shape)}" for variable in self._model.variables
            )
            backend = keras.backend.backend()
            version = sys.modules[backend].__version__
            self._program = (
                f"keras {keras.__version__} on {backend} {version}, variables {variables}"
            )
        return Signature(
            self._program,
            _computed(self._model),
            rows,
            tuple(
                Leaf(place, tuple(array.shape[1:]), keras.backend.standardize_dtype(array.dtype))
                for place, array in arrays
            ),
        )


def _computed(model: keras.Model) -> str:
    """A fingerprint of what a later `compile` may change: losses, optimizer, `jit_compile`."""
    losses = [
        (type(found).__name__, getattr(found, "fn", found))
        for found in keras.tree.flatten(model.loss)
    ]
    jit_compile = repr(model.jit_compile)
    return fingerprint(losses, type(model).train_step, type(model.optimizer), jit_compile)


def _has_moved(model: keras.Model, error: BaseException) -> bool:
    """Whether some weights may have moved when an error was raised; read from the traceback.

    They may have moved if the optimizer raised. They have moved if the metrics of Keras' own step
    raised, because they come after the optimizer.
    """

    def called(names: tuple[str, ...], owner: Any) -> bool:
        return any(
            frame.f_code.co_name in names and frame.f_locals.get("self") is owner
            for frame, _ in traceback.walk_tb(error.__traceback__)
        )

    return called(("apply", "apply_gradients"), model.optimizer) or (
        called(("train_step",), model) and called(("compute_metrics",), model)
    )


def _largest(model: keras.Model) -> list[tuple[str, int]]:
    """Names and bytes of the three largest variables, largest first."""
    sizes = [
        (variable.path, _bytes(variable.shape, variable.dtype)) for variable in model.variables
    ]
    return sorted(sizes, key=lambda found: -found[1])[:3]


def _bytes(shape: Any, dtype: str) -> int:
    bits = 8 if dtype == "bool" else int("".join(filter(str.isdigit, dtype)))
    count = 1
    for length in shape:
        count *= length
    return count * bits // 8
