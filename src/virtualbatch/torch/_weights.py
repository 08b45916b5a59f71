"""Weights of a window before its first forward, and the shares that follow from them.

The weights of all micro-batches come to the host in one copy, are checked there, and nothing of
the window is read after that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.torch._batch import Microbatch
from virtualbatch.window.shares import shares
from virtualbatch.window.terms import check_same_terms, check_steady_weights, weight_terms
from virtualbatch.window.tree import rank


class Shares(NamedTuple):
    """Shares of every micro-batch of a window.

    Fields:
        rows: part of the window's rows, a float for each micro-batch.
        terms: term name -> the same for that term's weight; None when all terms weigh by rows.
            A term that does not depend on the rows has the shares of the rows, which sum to 1.
        window: rows of the window.
    """

    rows: list[float]
    terms: dict[Any, list[float]] | None
    window: int

    def of_rows_or_term(self) -> list[float]:
        """The shares of each micro-batch as one: of its only term, or of its rows."""
        if self.terms is None or len(self.terms) != 1:
            return self.rows
        return next(iter(self.terms.values()))

    @property
    def counted(self) -> int:
        """Micro-batches that count for something."""
        return sum(1 for share in self.of_rows_or_term() if share > 0)

    def of(self, terms: Mapping[Any, Any], index: int) -> list[float]:
        """Shares of a micro-batch for each of its terms.

        Raises:
            ValueError: the names are not those of the weights.
        """
        if self.terms is None:
            return [self.rows[index]] * len(terms)
        check_same_terms(terms, self.terms)
        return [self.terms[name][index] for name in terms]

    def empty(self) -> list[bool]:
        """For each micro-batch, whether it contributes nothing to any term."""
        if self.terms is None:
            return [False] * len(self.rows)
        return [
            not any(found[index] for found in self.terms.values())
            for index in range(len(self.rows))
        ]


def window_shares(
    microbatches: Sequence[Microbatch], weight: Callable[[Any], Any] | None
) -> Shares:
    """Shares of a window by rows and, if a weight function is given, by its weights.

    Args:
        microbatches: the window's micro-batches.
        weight: micro-batch -> what the loss was divided by: a scalar >= 0, or a dict of them by
            term name, None marking a term that does not depend on the rows.

    Returns:
        The shares.

    Raises:
        ValueError: a weight is negative, not finite, not a scalar, or names differ between
            micro-batches.
    """
    window = sum(found.rows for found in microbatches)
    rows = shares([float(found.rows) for found in microbatches])
    if weight is None:
        return Shares(rows, None, window)
    with torch.no_grad():
        found = [_checked(weight(microbatch.get())) for microbatch in microbatches]
        for terms in found:
            check_steady_weights(terms, found[0])
        names = [name for name, value in found[0].items() if value is not None]
        table = _on_host([terms[name] for name in names for terms in found])
    result = dict.fromkeys(found[0], rows)
    for k, name in enumerate(names):
        result[name] = shares(table[k * len(found) : (k + 1) * len(found)])
    return Shares(rows, result, window)


def _checked(weight: Any) -> dict[Any, Any]:
    terms = weight_terms(weight)
    for name, value in terms.items():
        if value is None and isinstance(weight, Mapping):
            continue
        is_array = hasattr(value, "shape")
        if (is_array and rank(value) != 0) or (not is_array and not _is_number(value)):
            got = f"shape {tuple(value.shape)}" if is_array else repr(value)
            raise ValueError(
                "A weight must be one number per micro-batch and term. "
                f"Got {got} for term {name!r}. "
                "Reduce it to what the loss was divided by, for example by a sum over the mask."
            )
    return terms


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str | bytes)


def _on_host(values: Sequence[Any]) -> list[float]:
    """The values as floats, those of one device in one copy."""
    result = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
    groups: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            groups.setdefault(value.device, []).append(index)
    for device, places in groups.items():
        # Apple's GPUs have no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        numbers = torch.stack([values[index].detach().to(wide) for index in places]).tolist()
        for index, number in zip(places, numbers, strict=True):
            result[index] = number
    return result
