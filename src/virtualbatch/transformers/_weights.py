"""What a loss inside a trainer may have been divided by, the likeliest first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from virtualbatch.transformers._rows import rows_of
from virtualbatch.window.terms import SUM

Inputs = Mapping[str, Any]
_IGNORED = -100


class Candidate(NamedTuple):
    """A weight that may be right.

    Fields:
        name: in words.
        weight: the inputs of a micro-batch -> a scalar, or "sum".
    """

    name: str
    weight: Callable[[Inputs], Any] | str

    @property
    def is_sum(self) -> bool:
        """Whether the loss is a share of its window already."""
        return self.weight == SUM


def candidates(
    inputs: Inputs, is_pairs: bool, count: Callable[[Inputs], torch.Tensor | None]
) -> list[Candidate]:
    """The weights that the inputs of a trainer can have.

    Args:
        inputs: of one micro-batch.
        is_pairs: whether a row is a pair.
        count: inputs -> what the trainer itself divides by; None if it gives its loss no count.
    """
    found = []
    if count(inputs) is not None:
        found.append(Candidate("the trainer's count of labels", count))
    row = "pairs" if is_pairs else "rows"
    found.append(Candidate(row, lambda x: torch.tensor(rows_of(x, is_pairs))))
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        found.append(Candidate("labels", lambda x: (x["labels"] != _IGNORED).sum()))
        found.append(Candidate("shifted labels", lambda x: (x["labels"][:, 1:] != _IGNORED).sum()))
    if "completion_mask" in inputs:
        found.append(Candidate("tokens of completions", lambda x: completion_tokens(x).sum()))
        if is_pairs:
            found.append(Candidate("tokens of chosen completions", chosen_tokens))
    return [*found, Candidate("sum", SUM)]


def completion_tokens(inputs: Inputs) -> torch.Tensor:
    """The mask of the tokens that TRL's losses count, shape (rows, tokens)."""
    mask: torch.Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def chosen_tokens(inputs: Inputs) -> torch.Tensor:
    """The number of tokens that are predicted in the chosen completions of pairs."""
    return completion_tokens(inputs).chunk(2)[0][:, 1:].sum()
