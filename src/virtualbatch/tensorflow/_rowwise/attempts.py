"""Runs an eager pass, and runs it again in smaller micro-batches if memory runs out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from virtualbatch.plan.auto import CurrentSize
from virtualbatch.plan.retry import Memory, run_until_it_fits
from virtualbatch.tensorflow._batch import smaller_segments
from virtualbatch.tensorflow._plan.memory import ERRORS, largest_variables, left_bytes
from virtualbatch.tensorflow._rowwise.program import Reached
from virtualbatch.tensorflow._rowwise.state import State
from virtualbatch.tensorflow._segment import Segment

_MEMORY = Memory(ERRORS, left_bytes)

# Runs a pass on the given micro-batches.
Pass = Callable[[Sequence[Segment]], Any]


class Attempts(NamedTuple):
    """The attempts of one eager call.

    Fields:
        batch: a batch or a Window.
        size: the current size.
        reached: the variables that the function reaches.
    """

    batch: Any
    size: CurrentSize
    reached: Reached

    def first(
        self, run: Pass, cut: Sequence[Segment], before: State
    ) -> tuple[Any, Sequence[Segment]]:
        """Runs the first pass until it fits.

        Args:
            run: the pass.
            cut: the micro-batches of the first attempt.
            before: the state that every attempt starts from.

        Returns:
            The result of the pass, and the micro-batches that fitted.
        """
        fitted: list[Sequence[Segment]] = []

        def attempt(cut: Sequence[Segment]) -> Any:
            found = run(cut)
            fitted[:] = [cut]
            return found

        found = self._until_it_fits(attempt, cut, before)
        self.size.succeeded()
        return found, fitted[0]

    def second(self, run: Pass, cut: Sequence[Segment], before: State, drawn: bool) -> Any:
        """Runs the second pass, until it fits if smaller micro-batches give the same result.

        Args:
            run: the pass.
            cut: the micro-batches of the first pass.
            before: the state that every attempt starts from.
            drawn: whether Python or NumPy drew random numbers in the first pass.

        Raises:
            MemoryError: memory ran out, and other micro-batches would have given other outputs.
        """
        if not (drawn or self.reached.written):
            return self._until_it_fits(run, cut, before)
        try:
            return run(cut)
        except ERRORS.kinds as error:
            if not ERRORS.is_possible(error):
                raise
            rows = _most_rows(cut)
            raise MemoryError(
                "The gradient of a rowwise function needs the memory of a micro-batch once more. "
                f"Got an out-of-memory error with micro-batches of {rows} rows, which cannot be "
                "made smaller now: their outputs are in use, and random numbers or layers depend "
                f"on the cut. Pass microbatch_size={max(1, rows // 2)}."
            ) from error

    def _until_it_fits(self, run: Pass, cut: Sequence[Segment], before: State) -> Any:
        return run_until_it_fits(
            run,
            cut,
            _most_rows,
            partial(smaller_segments, self.batch),
            self.size,
            _MEMORY,
            partial(largest_variables, self.reached.variables),
            put_back=before.put_back,
        )


def _most_rows(cut: Sequence[Segment]) -> int:
    return max(segment.rows(0) for segment in cut)
