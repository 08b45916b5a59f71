"""Checks a hand-written training loop against itself, run on whole batches.

The loop runs on micro-batches, and again on whole batches without accumulation. Both runs must
leave the same state. If they do not, smaller runs show which mistake it is.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from virtualbatch.certify.certificate import Certificate, derived_tolerance
from virtualbatch.certify.loop_causes import Probe, Runs, causes
from virtualbatch.window.cut import check_sizes
from virtualbatch.window.gather import is_known
from virtualbatch.window.row_list import RowList
from virtualbatch.window.tree import array_leaves, builder, common_rows, parts_of, with_row_lists
from virtualbatch.window.window import is_iterable


def certify_loop(
    loop: Callable[[list[Any], int], Any],
    batches: Iterable[Any],
    *,
    microbatch_size: int,
    save: Callable[[], Any],
    load: Callable[[Any], Any],
) -> Certificate:
    """Proves that a loop of your own makes the updates of the whole batch, or names its mistake.

    The loop runs on micro-batches, two full windows and a short one. Then it runs on the same rows
    as whole batches with `accumulation_steps=1`, which is ordinary training. Afterwards the state
    is restored. The verdict holds for any optimizer; causes are named most reliably with plain SGD.
    A mistake that is also made on whole batches is not found.

    Args:
        loop: (list of micro-batches, accumulation_steps) -> anything. It trains in place, and its
            random numbers must be the same in every run.
        batches: two whole batches or more, in a list, a loader or any iterable; the first two are
            used. Nested mappings, lists, tuples and dataclasses of arrays that share their leading
            axis. Lists as long as a batch follow them.
        microbatch_size: rows of one micro-batch; fewer than a batch has.
        save: () -> the state as nested mappings and sequences of arrays and numbers: the weights
            and everything else to compare, such as an average of weights or a learning rate.
        load: restores what `save` returned.

    Returns:
        The certificate. Its `parameters` are the entries of the state; an error is relative to the
        change that the updates make to the entry.

    Raises:
        ValueError: there is nothing to compare, the loop is not deterministic, or the state holds
            no array or is not finite.

    Example:
        >>> weights = np.array([1.0, 2.0])
        >>> def loop(microbatches, accumulation_steps):
        ...     for start in range(0, len(microbatches), accumulation_steps):
        ...         window = microbatches[start : start + accumulation_steps]
        ...         weights[:] -= 0.1 * sum(x.mean(0) for x in window) / len(window)
        >>> def load(state):
        ...     weights[:] = state
        >>> rng = np.random.default_rng(0)
        >>> batches = [rng.normal(size=(7, 2)), rng.normal(size=(7, 2))]
        >>> found = certify_loop(loop, batches, microbatch_size=3, save=weights.copy, load=load)
        >>> found.exact, found.findings[0].kind
        (False, 'weight')
    """
    check_sizes(microbatch_size, None)
    # Narrow NumPy integers would overflow.
    microbatch_size = int(microbatch_size)
    for name, function in (("loop", loop), ("save", save), ("load", load)):
        if not callable(function):
            raise TypeError(
                f"{name} must be a function. Got {name}={function!r}. "
                "See the example in the docstring of certify_loop."
            )
    if not is_iterable(batches):
        raise TypeError(
            "batches must be an iterable of whole batches. "
            f"Got {batches!r}. Pass a list of two, or a loader."
        )
    first, second = _two(batches, microbatch_size)
    start = copy.deepcopy(save())
    if not _leaves(start):
        raise ValueError(
            "save must return the state that is trained. Got no array and no number. "
            "Return for example {'weights': [w1, w2]}."
        )
    try:
        return _certified(loop, first, second, microbatch_size, save, load, start)
    finally:
        load(copy.deepcopy(start))


def _certified(
    loop: Callable[[list[Any], int], Any],
    first: Any,
    second: Any,
    microbatch_size: int,
    save: Callable[[], Any],
    load: Callable[[Any], Any],
    start: Any,
) -> Certificate:
    steps = -(-_rows(first) // microbatch_size)

    def run(calls: Sequence[Sequence[Any]], accumulation_steps: int) -> dict[str, np.ndarray]:
        load(copy.deepcopy(start))
        for microbatches in calls:
            loop(list(microbatches), accumulation_steps)
        return _flat(save())

    def due(*batches: Any) -> dict[str, np.ndarray]:
        return run([[batch] for batch in batches], 1)

    def window(microbatches: list[Any]) -> dict[str, np.ndarray]:
        return run([microbatches], steps)

    def accumulated(*batches: Any) -> dict[str, np.ndarray]:
        return window([piece for batch in batches for piece in _cut(batch, microbatch_size)])

    # Its window has fewer micro-batches than the loop expects.
    short = _part(second, 0, max(1, steps // 2) * microbatch_size)
    batches = [first, second, short]
    whole = due(*batches)
    # An optimizer may create its state at the first update.
    known = _flat(start)
    before = {name: known.get(name, np.zeros_like(value)) for name, value in whole.items()}
    _check(before, whole, due(*batches))
    turned = due(*(_reversed(batch) for batch in batches))
    dtypes = [np.asarray(leaf).dtype for leaf in _leaves(start).values()]
    epsilon = max((float(np.finfo(d).eps) for d in dtypes if d.kind == "f"), default=2e-16)
    tolerance = derived_tolerance(epsilon, epsilon, _rows(first))
    probe = Probe(before, steps, tolerance, epsilon, whole, turned)
    found = accumulated(*batches)
    errors = probe.errors(found, whole)
    full = _cut(_part(first, 0, _rows(first) // microbatch_size * microbatch_size), microbatch_size)
    runs = Runs(due, accumulated, window, lambda batches: run([batches], 1), full)
    same = probe.same(found, whole)
    findings = () if same else causes(probe, runs, first, second, short)
    return Certificate(
        exact=not findings,
        max_error=max(errors.values()),
        tolerance=tolerance,
        parameters=errors,
        findings=findings,
        notes=(f"Compared after two windows of {steps} micro-batches and a short one.",),
    )


def _two(batches: Iterable[Any], microbatch_size: int) -> tuple[Any, Any]:
    found = list(islice(batches, 2))
    if len(found) < 2:
        raise ValueError(
            "certify_loop needs two whole batches, to check what a window leaves for the next. "
            f"Got {len(found)}. Pass a list of batches, or a loader."
        )
    first, second = found
    rows = [_rows(first), _rows(second)]
    if rows[0] != rows[1]:
        raise ValueError(
            "certify_loop needs batches of equal rows. "
            f"Got {rows[0]} and {rows[1]}. Leave out a short last batch."
        )
    if rows[0] < 2 * microbatch_size:
        raise ValueError(
            "certify_loop needs at least two micro-batches of whole size in a batch. "
            f"Got {rows[0]} rows and microbatch_size={microbatch_size}. "
            "Pass larger batches or a smaller microbatch_size."
        )
    return first, second


def _check(before: Mapping[str, np.ndarray], a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    for name, value in a.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(
                f"The state must be finite. Got NaN or infinity in {name} after updates on whole "
                "batches. Lower the learning rate, or check the data."
            )
        if not np.array_equal(value, b[name]):
            raise ValueError(
                "The loop must do the same each time. "
                f"Got another {name} from the same batches and the same state. Set random seeds "
                "inside the loop, turn dropout off, and let save and load cover all state."
            )
    if all(np.array_equal(value, before[name]) for name, value in a.items()):
        raise ValueError(
            "The loop must change the state. Got the same state after updates on whole batches. "
            "Return from save what the loop trains."
        )


def _rows(batch: Any) -> int:
    arrays = array_leaves(batch)
    for path, leaf in arrays:
        if not is_known(leaf) or str(leaf.dtype) == "object":
            raise TypeError(
                "Arrays of a batch must be dense arrays of NumPy, PyTorch, TensorFlow or JAX. "
                f"Got {path} of type {type(leaf).__name__}. Convert it to an array of numbers."
            )
    rows = common_rows(arrays)
    if rows is None:
        raise ValueError("internal: a batch has no number of rows.")
    return rows


def _part(batch: Any, start: int, stop: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf.cut(start, stop) if isinstance(leaf, RowList) else leaf[start:stop]

    return _mapped(cut, batch)


def _cut(batch: Any, size: int) -> list[Any]:
    return [_part(batch, k, k + size) for k in range(0, _rows(batch), size)]


def _reversed(batch: Any) -> Any:
    rows = _rows(batch)

    def turned(leaf: Any) -> Any:
        if isinstance(leaf, RowList):
            return leaf.chosen(reversed(range(rows)))
        # PyTorch has no negative steps, and NumPy returns a view.
        if hasattr(leaf, "flip"):
            return leaf.flip(0)
        return leaf[::-1].copy() if isinstance(leaf, np.ndarray) else leaf[::-1]

    return _mapped(turned, batch)


def _mapped(fn: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with fn applied to every leaf that has rows."""
    found: list[tuple[str, Any]] = []
    build = builder(batch, "batch", found)
    leaves = with_row_lists([leaf for _, leaf in found], _rows(batch))
    return build([fn(x) if hasattr(x, "shape") or isinstance(x, RowList) else x for x in leaves])


def _leaves(state: Any, path: str = "") -> dict[str, Any]:
    parts = parts_of(state)
    if parts is None:
        is_value = hasattr(state, "shape") or isinstance(state, int | float | np.number)
        return {path.removeprefix(".") or "state": state} if is_value else {}
    places = [place for place, _ in parts[0]]
    if isinstance(state, Mapping):
        # Names as in state_dict: model.weight for ['model']['weight'].
        places = [f".{key}" for key in state]
    return {
        name: leaf
        for place, (_, part) in zip(places, parts[0], strict=True)
        for name, leaf in _leaves(part, path + place).items()
    }


def _flat(state: Any) -> dict[str, np.ndarray]:
    # A copy: the state is trained in place, and asarray may share its memory.
    leaves = _leaves(state).items()
    return {name: np.asarray(leaf).astype(np.float64, copy=True) for name, leaf in leaves}
