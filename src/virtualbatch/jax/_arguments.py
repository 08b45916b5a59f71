"""The arguments of a call that hold rows, joined into one batch for the engine."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax

from virtualbatch.jax._arrays import is_array
from virtualbatch.window.terms import Weight
from virtualbatch.window.window import Window

# A weight function takes a micro-batch. If several arguments hold rows, it takes one part of the
# micro-batch per argument.
GivenWeight: TypeAlias = Callable[..., Weight | Mapping[Any, Weight | str]] | Literal["sum"] | None


class BatchArguments:
    """The arguments that hold rows, as one batch.

    The engine cuts one argument. If several arguments hold rows, the first one is replaced by the
    tuple of all of them, and the others are replaced by None.

    Args:
        batch_argnum: the user's position or positions, checked.
    """

    def __init__(self, batch_argnum: int | Sequence[int]):
        self._several = isinstance(batch_argnum, Sequence)
        given = batch_argnum if isinstance(batch_argnum, Sequence) else [batch_argnum]
        self._positions = [operator.index(position) for position in given]
        self.position = self._positions[0]

    def function(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The user's function, but with the arguments that `gathered` gives."""
        if not self._several:
            return fun

        def of_gathered(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            for position, part in zip(self._positions, args[self.position], strict=True):
                given[position] = part
            return fun(*given, **kwargs)

        return of_gathered

    def weight(self, weight: GivenWeight) -> GivenWeight:
        """The user's weight, but for a batch as `gathered` gives it."""
        if not callable(weight) or not self._several:
            return weight
        return lambda batch: weight(*batch)

    @property
    def weight_takes(self) -> str:
        """The arguments of the user's weight function, as code."""
        return "*batch" if self._several else "batch"

    def gathered(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The positional arguments, with one batch among them.

        Raises:
            ValueError: some batch arguments are Windows and others are not, or the Windows differ
                in length.
        """
        if not self._several:
            return tuple(args)
        parts = [args[position] for position in self._positions]
        batch: Any = tuple(parts)
        if any(isinstance(part, Window) for part in parts):
            if len({len(part) if isinstance(part, Window) else None for part in parts}) > 1:
                raise ValueError(
                    "Batch arguments must all be Windows of one length, or none of them a Window. "
                    f"Got {', '.join(map(_in_words, parts))}. Cut all of them alike."
                )
            is_sorted = any(part.sorted_rows for part in parts)
            batch = Window(zip(*parts, strict=True), sorted_rows=is_sorted)
        result = [None if k in self._positions else arg for k, arg in enumerate(args)]
        result[self.position] = batch
        return tuple(result)


def refuse_uncut_rows(
    args: Sequence[Any], kwargs: Mapping[str, Any], cut: Sequence[int], rows: int
) -> None:
    """Refuses arguments that look like rows of the batch, but would reach every micro-batch whole.

    A loss may broadcast them against the rows of a micro-batch, and be silently wrong.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        cut: the positions of arguments that are not checked: the batch, differentiated arguments
            and keys.
        rows: rows of the batch.

    Raises:
        ValueError: an argument is a Window, or all its arrays are as long as the batch. If only
            some of its arrays have that length, that is taken for chance.
    """
    others = [(str(k), arg) for k, arg in enumerate(args) if k not in cut]
    for name, arg in [*others, *((repr(name), arg) for name, arg in kwargs.items())]:
        arrays = [leaf for leaf in jax.tree.leaves(arg) if is_array(leaf) and not _is_key(leaf)]
        as_rows = bool(arrays) and all(leaf.shape[:1] == (rows,) for leaf in arrays)
        if as_rows or isinstance(arg, Window):
            raise ValueError(
                "Arguments that hold rows must be cut with the batch. "
                f"Got argument {name}, {_in_words(arg)}, beside a batch of {rows} rows. "
                "Pass it by position and name all of them, such as batch_argnum=(1, 2); or, if it "
                "belongs to every row, close over it."
            )


def _is_key(leaf: Any) -> bool:
    """Whether a leaf may be one raw key of `PRNGKey`, which has two or four numbers."""
    return bool(leaf.dtype == jax.numpy.uint32) and leaf.shape in ((2,), (4,))


def _in_words(arg: Any) -> str:
    if isinstance(arg, Window):
        return f"a Window of {len(arg)}"
    if is_array(arg):
        return f"an array of shape {tuple(arg.shape)}"
    return f"a {type(arg).__name__}"
