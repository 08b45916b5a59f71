"""Columns that are padding in all rows of a micro-batch, which are cut off before it runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.transformers._rows import Form

# Their softmax is over all columns, those of padding too.
_OVER_COLUMNS = ("start_positions", "end_positions")
_DECODER = ("labels", "decoder_input_ids", "decoder_attention_mask")


class Padded(NamedTuple):
    """Tensors that are padded together on their second axis.

    Fields:
        names: theirs.
        lengths: columns that each row needs, on the host.
    """

    names: tuple[str, ...]
    lengths: list[int]


def padded(inputs: Mapping[str, Any], form: Form, is_encoder_decoder: bool) -> list[Padded]:
    """What of some inputs is padded, and how much of it each row needs.

    A column is needed up to the last one whose mask is not 0, or whose label counts. So padding on
    the left is kept, and padding that is learned is no padding. Nothing is cut off where answers
    are looked for in all columns.

    Args:
        inputs: as a trainer has them.
        form: of these inputs.
        is_encoder_decoder: whether labels are padded apart from what is read.
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
        inputs: as a trainer has them.
        names: tensors that are padded together.
        lengths: columns that each row needs, for each of those groups.
    """
    for group, needed in zip(names, lengths, strict=True):
        longest = max(1, *needed) if needed else 1
        for name in group:
            if inputs[name].shape[1] > longest:
                # Models take labels apart by `view`, which needs one piece of memory.
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
