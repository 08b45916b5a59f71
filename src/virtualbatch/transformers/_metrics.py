"""Metrics that TRL's losses append, one entry per call: a window counts as one call."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from virtualbatch.transformers._attributes import PlainAttributes
from virtualbatch.transformers._rows import rows_of
from virtualbatch.transformers._weights import chosen_tokens, completion_tokens

# What is a mean over tokens and not over the rows of a micro-batch.
_OF_CHOSEN = ("mean_token_accuracy", "logits/chosen", "logits/rejected")
_OF_TOKENS = ("entropy", "kl", "cispo_clip_ratio", "vespo/phi_seq_mean")


class Counted(NamedTuple):
    """What one micro-batch of a window counts in means; scalars.

    Fields:
        rows: its rows, or pairs.
        weight: what its loss was divided by.
        tokens: its tokens that count.
        chosen: those of the chosen rows of pairs; else all.
    """

    rows: Any
    weight: Any
    tokens: Any
    chosen: Any


def counted(
    inputs: Mapping[str, Any],
    weight: Callable[[Mapping[str, Any]], Any] | str,
    count: Callable[[Mapping[str, Any]], Any],
    is_pairs: bool,
) -> Counted:
    """What a micro-batch counts.

    Args:
        inputs: its inputs.
        weight: of the loss.
        count: inputs -> the number of items that the trainer divides by, or None.
        is_pairs: whether a row is a pair.
    """
    rows = rows_of(inputs, is_pairs)
    if "completion_mask" in inputs:
        mask = completion_tokens(inputs)
        tokens = (mask[:, 1:] if is_pairs else mask).sum()
    else:
        of_labels = count(inputs)
        tokens = rows if of_labels is None else of_labels
    chosen = chosen_tokens(inputs) if is_pairs and "completion_mask" in inputs else tokens
    return Counted(rows, weight(inputs) if callable(weight) else rows, tokens, chosen)


def merge_metrics(
    metrics: Any, before: PlainAttributes, counts: Sequence[Counted], *, is_sum: bool
) -> None:
    """Replaces the entries of a window's micro-batches by one.

    Args:
        metrics: name -> list of numbers, changed in place.
        before: the attributes of the trainer before the window.
        counts: of the micro-batches that ran, in order.
        is_sum: whether losses of micro-batches add up.
    """
    for name, values in metrics.items():
        start = len(before.held(values))
        new = values[start:]
        is_each = len(new) == len(counts) > 1
        if is_each and all(isinstance(value, numbers.Number) for value in new):
            values[start:] = [_merged(name, new, counts, is_sum)]


def _merged(name: str, values: Sequence[Any], counts: Sequence[Counted], is_sum: bool) -> Any:
    last = name.rsplit("/", 1)[-1]
    if last.startswith("min_") or last.endswith("_min"):
        return min(values)
    if last.startswith("max_") or last.endswith("_max"):
        return max(values)
    if name == "policy_loss" and is_sum:
        return sum(values)
    if name in _OF_CHOSEN:
        by = [float(each.chosen) for each in counts]
    elif name in _OF_TOKENS or last.endswith("_mean"):
        by = [float(each.tokens) for each in counts]
    elif name == "policy_loss":
        by = [float(each.weight) for each in counts]
    else:
        by = [float(each.rows) for each in counts]
    total = sum(by)
    pairs = zip(by, values, strict=True)
    return sum(n * value for n, value in pairs if n) / total if total else values[-1]
