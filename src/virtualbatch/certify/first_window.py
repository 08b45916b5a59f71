"""The law, tried on a few of the user's own rows before the first window of a loss is run.

Two parts of one to four rows run alone and together. If the gradients of the parts do not add up
to that of both, the rows are certified, which tells rounding from a fault, and names the fault.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from virtualbatch.certify.certificate import Certificate, Finding
from virtualbatch.certify.diagnosis import SEES_OTHER_ROWS
from virtualbatch.certify.users_line import OURS
from virtualbatch.certify.weights import candidates
from virtualbatch.window.fingerprint import fingerprint

_log = logging.getLogger("virtualbatch")

# Rows that the parts are chosen of, and ways to choose them.
_POOL, _WAYS = 16, 64
# A difference of counts, as a logarithm, that no rounding hides.
_CLEAR = 0.1
# Right weights miss by about one epsilon of the narrowest dtype, wrong ones by 30 and more; what is
# between is certified as well, and so never refused for its rounding.
ROUNDING = 16.0
# Finding -> the page that explains it. Others are no fault of the loss.
_PAGES = {
    "weight": "docs/sums.md",
    "sum_loss": "docs/sums.md",
    "regulariser": "docs/sums.md",
    "coupled_rows": "docs/rows.md",
    "stateful": "docs/state.md",
}


class Distance(NamedTuple):
    """How far two parts are from the whole of them.

    Fields:
        off: largest difference in any gradient, in the largest gradient times epsilon of the
            narrowest dtype; NaN where something is not finite.
        is_same: whether both parts and the whole have one loss and one gradient.
        constant: the values of terms of the loss that have no gradient at all.
    """

    off: float
    is_same: bool
    constant: Mapping[Any, float]

    @classmethod
    def of(
        cls,
        sizes: Sequence[float],
        shares: Sequence[float],
        losses: Sequence[Mapping[Any, float]],
        constant: Mapping[Any, float],
        epsilon: float,
    ) -> "Distance":
        """The distance from what was measured.

        Args:
            sizes: the largest number of the first part's share; of it without the whole, which is
                the other part's share where the law holds; and of what is left without that.
            shares: what each part is of the whole.
            losses: of the first part, the whole and the other part, by term.
            constant: see above.
            epsilon: of the narrowest dtype.
        """
        first, second, left = sizes
        largest = max(sizes) if math.isfinite(first + second + left) else math.nan
        off = left / (largest * epsilon) if largest else 0.0
        alike = abs(first * shares[1] - second * shares[0]) <= 1e-3 * first * shares[1]
        is_same = bool(first) and alike and losses[0] == losses[1] == losses[2]
        return cls(off, is_same, constant)


class Seen(NamedTuple):
    """What was seen of a loss when it was tried.

    Fields:
        group: rows that belong together; 1 where each stands alone.
        writes_rows: whether it changes its rows in place.
    """

    group: int = 1
    writes_rows: bool = False

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Refuses micro-batches that cut apart what belongs together.

        Raises:
            ValueError: one is no multiple of the group.
        """
        if any(size % self.group for size in sizes):
            raise ValueError(
                "The rows of this loss belong together, so each micro-batch must have a multiple "
                f"of {self.group}. Got micro-batches of {', '.join(map(str, sizes))} rows. Pass "
                "another microbatch_size, and whole groups in the last batch. See docs/rows.md."
            )


class UntriedError(Exception):
    """Says why a loss cannot be tried."""


class Trial(ABC):
    """A loss and some rows of the user's; every method leaves the training as it was.

    Attributes:
        rows: how many there are to choose from.
        sizes: rows of the micro-batches of the window.
        empty: the rows of a micro-batch without weight.
        pairs: rows of the two parts of each pair. One and one tell a sum, unequal ones a wrong
            weight, and only about four and four show what sorts or compares rows.
        seen: what was seen so far.
    """

    rows: int
    sizes: Sequence[int]
    empty: range = range(0)
    pairs: Sequence[tuple[int, int]] = ((1, 1), (1, 2), (4, 4))
    seen = Seen()

    @abstractmethod
    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """The arrays of some rows of the batch, by the expressions that reach them."""

    @abstractmethod
    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        """How far the shares of two parts are from the gradient of both.

        Args:
            a: row numbers of the first part.
            b: of the second.

        Returns:
            The distance; None where the loss draws random numbers, which only `certificate` can
            keep by row.

        Raises:
            UntriedError: it draws random numbers that nobody can keep by row.
        """

    @abstractmethod
    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """The certificate of some rows, cut into micro-batches of a size."""


def parts(trial: Trial) -> list[tuple[list[int], list[int]]]:
    """The pairs of parts that are tried, as row numbers.

    A wrong weight shows only where it differs. So of many ways to part some rows of the batch that
    one is taken in which the parts differ most by whatever the batch's own arrays count.
    """
    some = min(trial.rows, max(a + b for a, b in trial.pairs))
    pool = _spread(trial.rows, max(some, min(trial.rows, _POOL)))
    counts = [found.per_row for found in candidates(trial.leaves(pool), len(pool))]
    empty = [*trial.empty][: some // 2]
    most = len(empty) or some // 2
    sizes = {(min(a, most), min(b, some - some // 2)): None for a, b in trial.pairs}
    random = np.random.default_rng(0)
    found = []
    for a, b in sizes:
        if not (a and b):
            continue
        b = min(b, a + 1)
        ways = [_spread(len(pool), a + b)]
        ways += [
            random.permutation(len(pool))[: a + b].tolist() for _ in range(_WAYS if counts else 0)
        ]
        best = max(ways, key=lambda way: _contrast(counts, way[:a], way[a:]))
        first, second = ([pool[k] for k in part] for part in (best[:a], best[a:]))
        if empty:
            first, second = (
                empty[:a],
                [row for row in [*first, *second] if row not in trial.empty][:b],
            )
        found.append((first, second))
    return found


def _spread(rows: int, some: int) -> list[int]:
    """Some row numbers, evenly spaced."""
    return [round(k * (rows - 1) / max(1, some - 1)) for k in range(some)]


def _contrast(counts: Sequence[np.ndarray], a: Sequence[int], b: Sequence[int]) -> float:
    """By how many of some counts two parts differ; a part that counts nothing has no mean."""
    total = 0.0
    for count in counts:
        first, second = float(count[a].mean()), float(count[b].mean())
        counted = first > 0 and second > 0
        total += min(abs(math.log(first / second)), _CLEAR) if counted else -_CLEAR
    return total


def prove(trial: Trial, why: Callable[[Exception], str], again: bool = False) -> str | None:
    """Tries the law on a few rows.

    Args:
        trial: see there.
        why: error -> why nothing could be tried, in words.
        again: whether another try follows if this one fails, in another state of the layers.

    Returns:
        None, or why it could not be tried.

    Raises:
        ValueError: the gradients of parts do not add up to that of the whole, or the engine
            refuses the loss.
        TypeError: the engine refuses it.
    """
    found: list[Distance] = []
    reason = "there is one row"
    chosen = parts(trial)
    for a, b in chosen:
        try:
            distance = trial.distance(a, b)
        except Exception as error:  # the user's code, on rows that it may not be made for
            if _is_ours(error) and not again:
                raise
            reason = str(error) if isinstance(error, UntriedError) else why(error)
            continue
        if distance is None:
            a, b = chosen[-1]
        elif not distance.off > ROUNDING:
            if math.isfinite(distance.off):
                found.append(distance)
            reason = "its gradient is not finite"
            continue
        try:
            certificate = trial.certificate(*_cut_like(a, b))
        except Exception as error:  # the same
            reason = str(error) if isinstance(error, UntriedError) else why(error)
            continue
        if not certificate.exact:
            return _refused(trial, _explained(trial, chosen[-1], certificate))
        if distance is None:
            return None
        found.append(distance)
    if not found:
        return reason
    constant = [
        name
        for name in found[0].constant
        if all(name in distance.constant for distance in found)
        and any(distance.constant[name] for distance in found)
    ]
    if constant:
        raise ValueError(
            "Every term of a loss must have a gradient. "
            f"Got {', '.join(map(repr, constant))} without one, which is added "
            "to the loss all the same. Return it beside the loss, with has_aux=True."
        )
    if all(distance.is_same for distance in found):
        _log.warning(
            "The loss is the same whatever rows it is given. If it uses a whole batch from outside "
            "instead of its argument, micro-batches save no memory. See docs/rows.md."
        )
    return None


# Of a Window that is taken as it is.
NO_ROWS = "its micro-batches have no common rows"


def untried(reason: str) -> None:
    """Logs that the law could not be tried.

    Args:
        reason: why.
    """
    _log.warning(
        "Whether micro-batches add up to their batch could not be tried (%s). Run certify once.",
        reason,
    )


def _is_ours(error: Exception) -> bool:
    """Whether this is a refusal of ours, which the window itself would raise as well."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    in_here = trace is not None and trace.tb_frame.f_code.co_filename.startswith(OURS)
    return in_here and isinstance(error, ValueError | TypeError)


def _cut_like(a: list[int], b: list[int]) -> tuple[list[int], int]:
    """Rows and a size by which an even cut gives these parts; its larger ones come first."""
    first, second = (b, a) if len(a) < len(b) else (a, b)
    return [*first, *second], len(first)


def _explained(trial: Trial, largest: tuple[list[int], list[int]], of_pair: Certificate) -> Finding:
    """What is wrong, told by as many rows as there are, else by those of the pair."""
    rows = [row for part in largest for row in part]
    try:
        of_all = trial.certificate(rows, math.ceil(len(rows) / 3))
    except Exception:  # the same code, on another number of rows
        return of_pair.findings[0]
    return (of_pair if of_all.exact else of_all).findings[0]


def _refused(trial: Trial, finding: Finding) -> str | None:
    """Refuses a loss by what is wrong with it; says it where that is no fault of the loss."""
    page = _PAGES.get(finding.kind)
    if page is None:
        return f"{finding.kind} at {finding.where}: {finding.why}"
    group = _group(trial) if finding.why == SEES_OTHER_ROWS else None
    if group is not None:
        trial.seen = trial.seen._replace(group=group)
        _log.warning(
            "The rows of this loss belong together by %d, and no micro-batch may cut them apart. "
            "See docs/rows.md.",
            group,
        )
        return None
    raise ValueError(
        "The gradients of micro-batches must add up to that of their batch. "
        f"Got a loss whose first rows show that they do not: {finding.kind} at {finding.where}. "
        f"{finding.why} {finding.fix} See {page}; check=False turns this check off."
    )


def _group(trial: Trial) -> int | None:
    """Rows that belong together, if the law holds for groups that no micro-batch cuts apart."""
    start = trial.empty.start
    for group in (2, 3, 4):
        if any(size % group for size in trial.sizes) or trial.rows < start + 3 * group:
            continue
        rows = [*range(start, start + 3 * group)]
        first, others = rows[:group], rows[group:]
        try:
            found = [trial.distance(first, others[:group]), trial.distance(first, others)]
        except Exception:  # the user's code, on numbers of rows that it may not be made for
            continue
        if all(distance is not None and distance.off <= ROUNDING for distance in found):
            return group
    return None


class Proven:
    """The losses that were tried with one module, or one set of variables, and what was seen.

    A loss is often written anew at each call. One that is still the same object is known at once,
    any other by what it does.
    """

    def __init__(self) -> None:
        self._objects: WeakKeyDictionary[Any, dict[Hashable, Seen]] = WeakKeyDictionary()
        self._texts: dict[Hashable, Seen] = {}

    def seen(self, loss_fn: Any, weight: Any, structure: Hashable) -> Seen | None:
        """What was remembered of a loss; None if it was not tried.

        Args:
            loss_fn: the loss function.
            weight: as the engine is given it.
            structure: of the batch, and whatever else asks for another try.
        """
        known, key = self._of_object(loss_fn, weight, structure)
        if key not in known:
            found = self._texts.get((fingerprint(loss_fn, weight), structure))
            if found is None:
                return None
            known[key] = found
        return known[key]

    def remember(self, loss_fn: Any, weight: Any, structure: Hashable, seen: Seen) -> None:
        """Remembers what was seen of a loss."""
        known, key = self._of_object(loss_fn, weight, structure)
        known[key] = self._texts[fingerprint(loss_fn, weight), structure] = seen

    def tell_once(self, loss_fn: Any, weight: Any, reason: str) -> None:
        """Logs, once, that a loss cannot be tried, and why."""
        if self.seen(loss_fn, weight, reason) is None:
            untried(reason)
            self.remember(loss_fn, weight, reason, Seen())

    def _of_object(
        self, loss_fn: Any, weight: Any, structure: Hashable
    ) -> tuple[dict[Hashable, Seen], Hashable]:
        # A bound method is a new object at every access, but its instance is not.
        owner = getattr(loss_fn, "__self__", loss_fn)
        code = getattr(loss_fn, "__code__", None)
        key = (code, getattr(weight, "__code__", weight), structure)
        try:
            known = self._objects.get(owner)
            if known is None:
                known = self._objects[owner] = {}
        except TypeError:  # not hashable, or without weak references
            known = {}
        return known, key
