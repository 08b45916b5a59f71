"""The candidates for what a trainer's loss was divided by, the likeliest first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from virtualbatch.transformers._rows import rows_of
from virtualbatch.window.terms import SUM

Inputs = Mapping[str, Any]
_IGNORED = -100
_ROWS, _TOKENS, _SUM = "rows", "tokens of completions", "sum"
# The type of TRL's GRPO loss -> what it divides by.
_OF_GRPO = {
    "grpo": _ROWS,
    "sapo": _ROWS,
    "dr_grpo": _ROWS,
    "luspo": _ROWS,
    "bnpo": _TOKENS,
    "dapo": _SUM,
    "cispo": _SUM,
    "vespo": _SUM,
}


class Candidate(NamedTuple):
    """A weight that may be right.

    Fields:
        name: the weight in words.
        weight: a function (inputs of a micro-batch -> a scalar), or "sum".
    """

    name: str
    weight: Callable[[Inputs], Any] | str

    @property
    def is_sum(self) -> bool:
        """Whether the loss is already a share of its window's loss."""
        return self.weight == SUM


def likeliest(trainer: Any) -> str | None:
    """The name of the candidate by which a GRPO trainer is known to divide; None for others.

    GRPO's gradients are 0 if all completions of a prompt are equally good. So the rows of the first
    window may decide nothing.

    Args:
        trainer: a `transformers.Trainer`.
    """
    if "GRPOTrainer" not in {each.__name__ for each in type(trainer).__mro__}:
        return None
    return _OF_GRPO.get(trainer.loss_type)


def candidates(
    inputs: Inputs,
    is_pairs: bool,
    count: Callable[[Inputs], torch.Tensor | None],
    first: str | None = None,
) -> list[Candidate]:
    """The weights that the inputs of a trainer can have.

    Args:
        inputs: the inputs of one micro-batch.
        is_pairs: whether a row is a pair.
        count: inputs -> the count that the trainer passes to its loss, or None.
        first: the name of the candidate to put first, if it is known.
    """
    found = []
    if count(inputs) is not None:
        found.append(Candidate("the trainer's count of labels", count))
    row = "pairs" if is_pairs else _ROWS
    found.append(Candidate(row, lambda x: torch.tensor(rows_of(x, is_pairs))))
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() and not labels.is_floating_point():
        found.append(Candidate("labels", lambda x: (x["labels"] != _IGNORED).sum()))
        if labels.dim() > 1:
            found.append(Candidate("shifted labels", shifted_labels))
            found.append(Candidate("rows with labels", lambda x: _rows_with(x["labels"])))
            found.append(
                Candidate("rows with shifted labels", lambda x: _rows_with(x["labels"][:, 1:]))
            )
    if "completion_mask" in inputs:
        found.append(Candidate(_TOKENS, lambda x: completion_tokens(x).sum()))
        if is_pairs:
            found.append(Candidate("tokens of chosen completions", chosen_tokens))
    found.append(Candidate(_SUM, SUM))
    return sorted(found, key=lambda each: each.name != first)


def shifted_labels(inputs: Inputs) -> torch.Tensor:
    """The number of labels that count, without the first label of each row."""
    return (inputs["labels"][:, 1:] != _IGNORED).sum()


def _rows_with(labels: torch.Tensor) -> torch.Tensor:
    """The number of rows with at least one label that counts."""
    return (labels != _IGNORED).flatten(1).any(1).sum()


def completion_tokens(inputs: Inputs) -> torch.Tensor:
    """The mask of the tokens that TRL's losses count, shape (rows, tokens)."""
    mask: torch.Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def chosen_tokens(inputs: Inputs) -> torch.Tensor:
    """The number of predicted tokens in the chosen completions of pairs."""
    return completion_tokens(inputs).chunk(2)[0][:, 1:].sum()
