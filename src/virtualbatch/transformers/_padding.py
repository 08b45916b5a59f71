"""Cuts off columns that are padding in all rows of a micro-batch, before it runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.transformers._rows import Form

# With these inputs the softmax is over all columns, including padding.
_OVER_COLUMNS = ("start_positions", "end_positions")
_DECODER = ("labels", "decoder_input_ids", "decoder_attention_mask")


class Padded(NamedTuple):
    """Tensors that are padded together on their second axis.

    Fields:
        names: the names of the tensors.
        lengths: the number of columns that each row needs, on the host.
    """

    names: tuple[str, ...]
    lengths: list[int]


def padded(inputs: Mapping[str, Any], form: Form, is_encoder_decoder: bool) -> list[Padded]:
    """The padded tensors of some inputs, and the number of columns that each row needs.

    A row needs its columns up to the last one whose mask is not 0, or whose label counts. So
    padding on the left is kept, and so is padding whose label counts. Nothing is cut off if answers
    are looked for in all columns.

    Args:
        inputs: the inputs as a trainer has them.
        form: the form of these inputs.
        is_encoder_decoder: whether labels are padded separately from the encoder's inputs.
    """
    if any(name in inputs for name in _OVER_COLUMNS):
        return []
    mask = inputs.get("attention_mask")
    labels = inputs.get("labels")
    found = []
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        needed = mask != 0
        if not is_encoder_decoder and _alike(labels, mask):
            needed = needed | (labels != -100)
        apart = _DECODER if is_encoder_decoder else ()
        names = [name for name, leaf in inputs.items() if _alike(leaf, mask) and name not in apart]
        found.append(Padded(tuple(names), _lengths(needed, form)))
    if is_encoder_decoder and isinstance(labels, torch.Tensor) and labels.dim() == 2:
        names = [name for name in _DECODER if _alike(inputs.get(name), labels)]
        found.append(Padded(tuple(names), _lengths(labels != -100, form)))
    return found


def trimmed(
    inputs: dict[str, Any], names: Sequence[Sequence[str]], lengths: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The inputs without the columns that none of their rows needs.

    Args:
        inputs: the inputs as a trainer has them.
        names: groups of names; the tensors of a group are padded together.
        lengths: for each group, the number of columns that each row needs.
    """
    for group, needed in zip(names, lengths, strict=True):
        longest = max(1, *needed) if needed else 1
        for name in group:
            if inputs[name].shape[1] > longest:
                # Models reshape labels with `view`, which needs contiguous memory.
                inputs[name] = inputs[name][:, :longest].contiguous()
    return inputs


def _alike(leaf: Any, mask: torch.Tensor) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and leaf.shape[:2] == mask.shape


def _lengths(needed: torch.Tensor, form: Form) -> list[int]:
    columns = torch.arange(1, needed.shape[1] + 1, device=needed.device)
    lengths = (needed * columns).amax(1) if needed.shape[1] else needed.sum(1)
    if form.is_pairs:
        lengths = lengths.reshape(2, -1).amax(0)
    found: list[int] = lengths.tolist()
    return found
