"""The size of a call's micro-batches: given or planned, and halved where memory runs out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._microbatch import Microbatch, most_rows
from virtualbatch.torch._plan.memory import ERRORS, largest_parameters, left_bytes
from virtualbatch.torch._plan.plan import planned
from virtualbatch.torch._plan.sizes import signature
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._remembered import remembered
from virtualbatch.torch._rows import RowsBefore
from virtualbatch.torch._window import Program


class Fit:
    """How a batch is cut, and how it is cut smaller if memory runs out.

    Args:
        program: the loss, its weight and its modules.
        batch: the batch or Window.
        microbatch_size: as the caller gave it, checked.
        accumulation_steps: as the caller gave it, checked.

    Attributes:
        cut: the micro-batches of the first attempt.
    """

    cut: Sequence[Microbatch]

    def __init__(
        self,
        program: Program,
        batch: ReadBatch,
        microbatch_size: int | str | Auto | None,
        accumulation_steps: int | None,
    ):
        self._found = program.found
        self._batch = batch
        self._accumulation_steps = accumulation_steps
        self._memory = Memory(ERRORS, partial(left_bytes, program.found.accelerator))
        self._size: CurrentSize | None = None
        given: Any = microbatch_size
        self._given: int | None = given
        if not batch.given or not batch.can_be_cut:
            self.cut = batch.given
        elif is_automatic(given):
            self._size = _planned_size(program, batch, given)
            self._given = self._size.rows
            self.cut = batch.cut(self._given, None)
        else:
            self.cut = batch.cut(given, accumulation_steps)
            asked = given or most_rows(self.cut)
            self._size = remembered(program.found.owner).sizes.asked(asked)
            if self._size.rows < asked:
                self.cut = self._smaller(self._size.rows)

    def run(
        self,
        window: Callable[[Sequence[Microbatch]], Any],
        cut: Sequence[Microbatch] | None = None,
        refuse: Callable[[BaseException], bool] = lambda error: False,
    ) -> Any:
        """Runs a window, and runs it again with smaller micro-batches while memory runs out.

        Args:
            window: micro-batches -> result of the window. If it raises, everything is as before.
            cut: the micro-batches of the first attempt; None for the attribute `cut`.
            refuse: error -> whether smaller micro-batches are not allowed. It may also raise an
                error that says why.

        Raises:
            MemoryError: not even a micro-batch of one row fits.
        """
        cut = self.cut if cut is None else cut
        if self._size is None:
            return run_as_it_is(partial(window, cut), self._memory)
        changed = RowsBefore(self._batch)
        result = run_until_it_fits(
            window,
            cut,
            most_rows,
            self._smaller,
            self._size,
            self._memory,
            partial(largest_parameters, self._found.roots[0]),
            put_back=RandomState(self._found.accelerator).restore,
            is_too_late=lambda error: refuse(error) or changed.refuse_changed(error),
        )
        self._size.succeeded()
        return result

    def _smaller(self, most: int) -> list[Microbatch]:
        return self._batch.cut(self._given, self._accumulation_steps, most)


def _planned_size(program: Program, batch: ReadBatch, automatic: Any) -> CurrentSize:
    sizes = automatic if isinstance(automatic, Auto) else remembered(program.found.owner).sizes
    return sizes.planned(
        signature(program, batch.whole), lambda: planned(program, batch, sizes.memory_limit)
    )
