"""How a batch is cut: sizes, rows, and streams that come already cut.

Nothing here touches an array: rows are counted from `shape`, and cuts are plain numbers.
"""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

from virtualbatch.sizes import Auto


def check_sizes(microbatch_size: Any, accumulation_steps: Any) -> None:
    """Refuses size arguments that no batch could satisfy.

    Args:
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: neither is given, one is zero, negative, fractional or a boolean, or both are
            given and one is automatic.
    """
    if is_automatic(microbatch_size):
        if accumulation_steps is not None:
            raise ValueError(
                'microbatch_size="auto" finds the number of micro-batches itself. '
                f"Got accumulation_steps={accumulation_steps!r} with it. Leave one of them out."
            )
        return
    if microbatch_size is None and accumulation_steps is None:
        raise ValueError(
            "A batch needs a size to be cut by. Got neither microbatch_size nor "
            "accumulation_steps. Pass microbatch_size=, the number of rows that fit in memory "
            "at once."
        )
    if microbatch_size is not None and not _is_positive_integer(microbatch_size):
        raise ValueError(
            'microbatch_size must be a positive integer or "auto". '
            f"Got microbatch_size={microbatch_size!r}. "
            "Pass the number of rows that fit in memory at once."
        )
    if accumulation_steps is not None and not _is_positive_integer(accumulation_steps):
        raise ValueError(
            "accumulation_steps must be a positive integer. "
            f"Got accumulation_steps={accumulation_steps!r}. "
            "Pass the number of micro-batches per update."
        )


def is_automatic(microbatch_size: Any) -> bool:
    """Whether a size is to be planned."""
    # Compared as text only: arrays would compare themselves element by element.
    return isinstance(microbatch_size, Auto) or (
        isinstance(microbatch_size, str) and microbatch_size == "auto"
    )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) > 0


def rows_per_microbatch(
    rows: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Any:
    """Rows of one micro-batch, from whichever size was given.

    Args:
        rows: rows of the batch; a Python int, or a traced integer scalar (then only `+ - //` are
            used and agreement of the two sizes is left to the engine).
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.

    Returns:
        microbatch_size, else ceil(rows / accumulation_steps).

    Raises:
        ValueError: both sizes are given and disagree for these rows.
    """
    if microbatch_size is None:
        if accumulation_steps is None:
            raise ValueError("internal: rows_per_microbatch needs one of the two sizes.")
        # NumPy integers would make the size a NumPy integer, which a graph does not know as static.
        steps = int(accumulation_steps)
        return (rows + steps - 1) // steps
    if accumulation_steps is not None and isinstance(rows, int):
        count = -(-rows // microbatch_size)
        if count != accumulation_steps:
            raise ValueError(sizes_disagree(rows, microbatch_size, accumulation_steps))
    return int(microbatch_size)


def sizes_disagree(rows: int | str, microbatch_size: int, accumulation_steps: int) -> str:
    """Text of the refusal for two sizes that do not describe the same cut."""
    arithmetic = f"{rows} rows"
    if isinstance(rows, int):
        arithmetic = (
            f"{rows} rows / {microbatch_size} = {-(-rows // microbatch_size)} micro-batches"
        )
    return (
        "microbatch_size and accumulation_steps must describe the same cut. "
        f"Got microbatch_size={microbatch_size} and accumulation_steps={accumulation_steps} for "
        f"{arithmetic}. Pass only one of them."
    )


def even_cut(rows: int, microbatch_size: int) -> list[tuple[int, int]]:
    """Cuts rows contiguously into as few micro-batches as fit, as equal as they can be.

    Sizes differ by at most one row, so that no lonely row meets a BatchNorm.

    Args:
        rows: rows of the batch, >= 1.
        microbatch_size: rows that one micro-batch may hold, >= 1.

    Returns:
        (start, stop) of each micro-batch, in order, covering `range(rows)`.
    """
    count = -(-rows // microbatch_size)
    size, extra = divmod(rows, count)
    stops = [(i + 1) * size + min(i + 1, extra) for i in range(count)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def array_leaves(structure: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Every array in a nested structure with the expression that reaches it.

    Arrays are what has a `shape`; other leaves (None, numbers, text) belong to every row.

    Args:
        structure: nested mappings, sequences and arrays.
        path: name of the structure itself.

    Yields:
        Pairs such as `("batch['x'][0]", array)`; mappings in the order of their keys.
    """
    if hasattr(structure, "shape"):
        yield path, structure
    elif isinstance(structure, Mapping):
        for key in structure:
            yield from array_leaves(structure[key], f"{path}[{key!r}]")
    elif hasattr(structure, "_fields"):
        for field in structure._fields:
            yield from array_leaves(getattr(structure, field), f"{path}.{field}")
    elif isinstance(structure, Sequence) and not isinstance(structure, str | bytes):
        for index, item in enumerate(structure):
            yield from array_leaves(item, f"{path}[{index}]")


def check_alike(places: Sequence[Sequence[str]]) -> None:
    """Refuses a window whose micro-batches differ in structure.

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
                f"window[{index}]. Make them with the same collate function."
            )


def rank(array: Any) -> int | None:
    """Number of axes of an array, or None where a traced shape leaves it open."""
    # TensorFlow refuses the length of an open shape, but tells its rank.
    open_shape = getattr(array.shape, "rank", 0) is None
    return None if open_shape else len(array.shape)


def common_rows(leaves: Iterable[tuple[str, Any]]) -> int | None:
    """Rows that all arrays of a batch share, as far as their shapes are known.

    Args:
        leaves: (path, array) pairs, as `array_leaves` gives them.

    Returns:
        The number of rows, or None where every array leaves it open (a traced shape).

    Raises:
        ValueError: there is no array, an array is a scalar, there are no rows, or two arrays
            have different numbers of rows.
    """
    known: tuple[str, int] | None = None
    found = False
    for path, leaf in leaves:
        found = True
        axes = rank(leaf)
        if axes is None:
            continue
        if axes == 0:
            raise ValueError(
                "Every array of a batch must have rows on its first axis. "
                f"Got the scalar {path}. Give it one value per row, or pass it to the loss "
                "function by a closure."
            )
        rows = leaf.shape[0]
        if rows is None:
            continue
        if rows == 0:
            raise ValueError(
                f"A batch must have at least one row. Got 0 rows in {path}. "
                "Skip empty batches before the call."
            )
        if known is not None and rows != known[1]:
            raise ValueError(
                "All arrays of a batch must have the same number of rows. "
                f"Got {known[1]} rows in {known[0]} and {rows} rows in {path}. "
                "Pass arrays that share their leading axis."
            )
        known = known or (path, int(rows))
    if not found:
        raise ValueError(
            "A batch must hold at least one array. Got none. "
            "Pass arrays or tensors that share their leading axis."
        )
    return known[1] if known else None


class Window(Sequence[Any]):
    """The micro-batches of one update, already cut.

    Wherever an engine takes a batch it takes a Window too, and then no size is given. A plain
    list stays a batch, because loaders give `[x, y]`.

    Args:
        microbatches: the micro-batches, each a nested structure of arrays with its own rows.
        sorted_rows: whether rows were sorted by something, as `pack` sorts them by length, so
            that a micro-batch is no random sample of them.

    Example:
        >>> window = Window(["first", "second"])
        >>> len(window), window[0]
        (2, 'first')
    """

    __slots__ = ("_microbatches", "_sorted_rows")

    def __init__(self, microbatches: Iterable[Any], *, sorted_rows: bool = False):
        self._microbatches = tuple(microbatches)
        self._sorted_rows = sorted_rows

    @property
    def sorted_rows(self) -> bool:
        """Whether rows were sorted, so that a micro-batch is no random sample of them."""
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
    """Refuses sizes that no batch could satisfy, and any size for what is already cut.

    Args:
        batch: a batch or a Window.
        microbatch_size: rows of one forward and backward, "auto", an `Auto`, or None.
        accumulation_steps: micro-batches per window, or None.

    Raises:
        ValueError: a size comes with a Window, or `check_sizes` refuses it for a batch.
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
    """Refuses a window without micro-batches.

    Raises:
        ValueError: the window is empty.
    """
    if len(window) == 0:
        raise ValueError(
            "A window must hold at least one micro-batch. Got an empty Window. "
            "Skip empty windows before the call."
        )


def windows(stream: Iterable[Any], *, accumulation_steps: int) -> Iterator[Window]:
    """Groups a stream of micro-batches into windows, one per update.

    Nothing is dropped: the last window is as short as the stream leaves it, and its own weight
    divides it.

    Args:
        stream: micro-batches, such as a `DataLoader` or a batched `tf.data.Dataset`.
        accumulation_steps: micro-batches per window; a positive integer.

    Returns:
        An iterator of Windows of `accumulation_steps` micro-batches, the last one maybe shorter.

    Raises:
        ValueError: accumulation_steps is not a positive integer (at the call), or the stream
            gave nothing (at the first `next`).

    Example:
        >>> [list(window) for window in windows("abcde", accumulation_steps=2)]
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    check_sizes(None, accumulation_steps)
    return _windows(iter(stream), accumulation_steps)


def _windows(microbatches: Iterator[Any], accumulation_steps: int) -> Iterator[Window]:
    group = tuple(islice(microbatches, accumulation_steps))
    if not group:
        raise ValueError(
            "windows needs at least one micro-batch. Got an empty stream. "
            "A generator can be read only once: pass a fresh one for each epoch."
        )
    while group:
        yield Window(group)
        group = tuple(islice(microbatches, accumulation_steps))
