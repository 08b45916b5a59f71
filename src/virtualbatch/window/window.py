"""A window: the micro-batches of one update, already cut."""

from collections.abc import Iterable, Sequence
from typing import Any, overload

from virtualbatch.window.cut import check_sizes

# The end of an error for a Window whose rows are unknown.
PASS_WEIGHT = (
    " Or pass weight=, what the loss of a micro-batch is divided by: then those of a Window are "
    "taken as they are. See docs/guides/rows.md."
)


def check_alike(places: Sequence[Sequence[str]]) -> None:
    """Raises an error if the micro-batches of a window differ in structure.

    Args:
        places: for each micro-batch its leaves in words, in any order.

    Raises:
        ValueError: a micro-batch has other leaves than the first.
    """
    for index, found in enumerate(places):
        if sorted(found) != sorted(places[0]):
            raise ValueError(
                "All micro-batches of a window must have the same structure. "
                f"Got {', '.join(places[0])} in window[0] and {', '.join(found)} in "
                f"window[{index}]. Make them with the same collate function.{PASS_WEIGHT}"
            )


def is_iterable(found: Any) -> bool:
    """Whether this can be iterated, judged without iterating."""
    # Not iter(found): a loader would start its workers.
    is_told = hasattr(found, "__iter__") or hasattr(found, "__getitem__")
    return is_told and not isinstance(found, type) and getattr(found, "shape", None) != ()


class Window(Sequence[Any]):
    """The micro-batches of one update, already cut.

    Wherever an engine takes a batch it takes a Window too, and then no size is given. A plain
    list stays a batch, because loaders give `[x, y]`.

    Args:
        microbatches: the micro-batches, each a nested structure of arrays with its own rows.
        sorted_rows: whether rows were sorted, as `pack` sorts them by length, so that a micro-batch
            is not a random sample of them.

    Raises:
        TypeError: the micro-batches cannot be iterated.

    Example:
        >>> window = Window(["first", "second"])
        >>> len(window), window[0]
        (2, 'first')
    """

    __slots__ = ("_microbatches", "_sorted_rows")

    def __init__(self, microbatches: Iterable[Any], *, sorted_rows: bool = False):
        if not is_iterable(microbatches):
            raise TypeError(
                "A Window is made of micro-batches. "
                f"Got {microbatches!r}. Pass a list of them: Window([first, second])."
            )
        self._microbatches = tuple(microbatches)
        self._sorted_rows = sorted_rows

    @property
    def sorted_rows(self) -> bool:
        """Whether rows were sorted, so that a micro-batch is not a random sample of them."""
        return self._sorted_rows

    def __len__(self) -> int:
        return len(self._microbatches)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Window": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Window(self._microbatches[index], sorted_rows=self._sorted_rows)
        return self._microbatches[index]

    def __repr__(self) -> str:
        return f"Window of {len(self)} micro-batches"

    def __tf_flatten__(self) -> tuple[tuple[bool], tuple[Any, ...]]:
        """Lets `tf.function` and `tf.nest` see the micro-batches (TensorFlow's nest protocol)."""
        return (self._sorted_rows,), self._microbatches

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[bool], components: Iterable[Any]) -> "Window":
        """Rebuilds the window from what `__tf_flatten__` gave."""
        return cls(components, sorted_rows=metadata[0])


def check_cut(batch: Any, microbatch_size: Any, accumulation_steps: Any) -> None:
    """Checks size arguments for a batch; a Window is already cut and takes none.

    Args:
        batch: a batch or a Window.
        microbatch_size: rows of one forward and backward, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: a size comes with a Window, or `check_sizes` raises it for a batch.
    """
    if not isinstance(batch, Window):
        check_sizes(microbatch_size, accumulation_steps)
    elif microbatch_size is not None or accumulation_steps is not None:
        raise ValueError(
            "A Window is already cut. "
            f"Got microbatch_size={microbatch_size} and accumulation_steps={accumulation_steps} "
            "with a Window. Leave both out."
        )


def check_window(window: Window) -> None:
    """Raises an error for a window without micro-batches.

    Raises:
        ValueError: the window is empty.
    """
    if len(window) == 0:
        raise ValueError(
            "A window must hold at least one micro-batch. Got an empty Window. "
            "Skip empty windows before the call."
        )


def refuse_sorted_rows(batch: Any, stats: bool) -> None:
    """Raises an error if noise statistics are requested for a window whose rows are sorted.

    Raises:
        ValueError: they are requested.
    """
    if stats and isinstance(batch, Window) and batch.sorted_rows:
        raise ValueError(
            "Noise statistics need micro-batches of random rows. Got stats=True with a Window "
            "whose rows are sorted by length. Take them from windows that are not packed, such as "
            "every tenth one."
        )
