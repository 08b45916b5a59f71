"""Merges metrics of TRL, whose losses append one entry per call: a window counts as one call."""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.transformers._attributes import PlainAttributes
from virtualbatch.transformers._rows import rows_of
from virtualbatch.transformers._weights import completion_tokens, shifted_labels

# Metrics that are means over tokens, not over the rows of a micro-batch.
_OF_TOKENS = ("entropy", "kl")
_OF_CHOSEN = ("mean_token_accuracy", "logits/chosen")
_OF_REJECTED = ("logits/rejected",)
# Metrics that are means over tokens if each token has a ratio of its own.
_OF_RATIO = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
)


class Counted(NamedTuple):
    """How much one micro-batch of a window counts in means; scalars.

    Fields:
        rows: its rows, or pairs.
        weight: what its loss was divided by.
        tokens: its tokens that count.
        chosen: its tokens that count in the chosen rows of pairs; else all its tokens that count.
        rejected: its tokens that count in the rejected rows of pairs; else all of them.
    """

    rows: Any
    weight: Any
    tokens: Any
    chosen: Any
    rejected: Any


def counted(
    inputs: Mapping[str, Any],
    weight: Callable[[Mapping[str, Any]], Any] | str,
    count: Callable[[Mapping[str, Any]], Any],
    is_pairs: bool,
) -> Counted:
    """How much a micro-batch counts in means.

    Args:
        inputs: its inputs.
        weight: the weight of the loss.
        count: inputs -> the number of items by which the trainer divides, or None.
        is_pairs: whether a row is a pair.
    """
    rows = rows_of(inputs, is_pairs)
    by_loss = weight(inputs) if callable(weight) else rows
    if "completion_mask" in inputs:
        mask = completion_tokens(inputs)
        if is_pairs:
            # Nothing predicts the first token, so it does not count.
            chosen, rejected = (half.sum() for half in mask[:, 1:].chunk(2))
            return Counted(rows, by_loss, chosen + rejected, chosen, rejected)
        tokens = mask.sum()
    else:
        of_labels = count(inputs)
        tokens = shifted_labels(inputs) if of_labels is None and "labels" in inputs else of_labels
        tokens = rows if tokens is None else tokens
    return Counted(rows, by_loss, tokens, tokens, tokens)


def merge_metrics(
    metrics: Any,
    before: PlainAttributes,
    counts: Sequence[Counted],
    *,
    is_sum: bool,
    ratios_are_of_tokens: bool,
) -> None:
    """Replaces the entries of a window's micro-batches by one entry.

    Args:
        metrics: name -> list of numbers, which is changed in place.
        before: the attributes of the trainer before the window.
        counts: the counts of the micro-batches that ran, in order.
        is_sum: whether losses of micro-batches add up.
        ratios_are_of_tokens: whether each token has an importance ratio, or each completion one.
    """
    for name, values in metrics.items():
        start = len(before.held(values))
        new = values[start:]
        if len(new) < 2 or not all(map(_is_number, new)):
            continue
        if len(new) != len(counts):
            # Some micro-batches had no entry, and it is not known which.
            values[start:] = [sum(new) / len(new)]
            continue
        by = _weights_of(name, ratios_are_of_tokens)
        values[start:] = [_merged(name, new, [by(each) for each in counts], is_sum)]


def _weights_of(name: str, ratios_are_of_tokens: bool) -> Callable[[Counted], float]:
    """The counts over which a metric is a mean."""
    if name in _OF_CHOSEN:
        return lambda each: float(each.chosen)
    if name in _OF_REJECTED:
        return lambda each: float(each.rejected)
    if name in _OF_TOKENS or (ratios_are_of_tokens and name in _OF_RATIO):
        return lambda each: float(each.tokens)
    if name == "policy_loss":
        return lambda each: float(each.weight)
    return lambda each: float(each.rows)


def _merged(name: str, values: Sequence[Any], by: Sequence[float], is_sum: bool) -> Any:
    # Like TRL, leave out NaN, such as the mean reward of no rows.
    pairs = [(n, value) for n, value in zip(by, values, strict=True) if not math.isnan(value)]
    if not pairs:
        return values[-1]
    last = name.rsplit("/", 1)[-1]
    if last.startswith("min_") or last.endswith("_min"):
        return min(value for _, value in pairs)
    if last.startswith("max_") or last.endswith("_max"):
        return max(value for _, value in pairs)
    if name == "policy_loss" and is_sum:
        return sum(value for _, value in pairs)
    total = sum(n for n, _ in pairs)
    return sum(n * value for n, value in pairs if n) / total if total else values[-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )
