"""The rows in the inputs of a trainer: one row is an entry of each tensor, or a pair of entries."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

# The values of padding that are not 0.
_FILLS = {"labels": -100, "shift_labels": -100}
# Token ids are padded with the model's own padding token.
_IDS = ("input_ids", "decoder_input_ids")
# Something else follows these tensors in a row, so padding must come before them.
_LEFT = ("prompt_ids", "prompt_mask")


class Form(NamedTuple):
    """How the inputs of one micro-batch are made of rows.

    Fields:
        is_pairs: whether a row is a pair: the chosen rows first, then as many rejected ones.
        halves: names of the tensors that hold both; others have one entry for each pair.
        scalars: names of the tensors without rows, which are the same for all rows.
        pad_token_id: the token of padding.
    """

    is_pairs: bool
    halves: frozenset[str]
    scalars: frozenset[str]
    pad_token_id: int

    def by_row(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with one entry per row in each tensor, as views if possible.

        Args:
            inputs: the inputs as a trainer has them.
        """
        rows = rows_of(inputs, self.is_pairs)
        found = dict(inputs)
        for name in self.halves:
            leaf = inputs[name]
            found[name] = leaf.reshape(2, rows, *leaf.shape[1:]).transpose(0, 1)
        for name in self.scalars:
            found[name] = inputs[name].expand(rows)
        return found

    def inputs(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of some rows, as a trainer has them: a new dict, which may be changed.

        Args:
            rows: a part of the result of `by_row`.
        """
        found = dict(rows)
        for name in self.halves:
            leaf = rows[name].transpose(0, 1)
            found[name] = leaf.reshape(-1, *leaf.shape[2:])
        for name in self.scalars:
            found[name] = rows[name][0]
        return found


def pad_token_id_of(model: Any) -> int:
    """The padding token of a model; 0 if the model does not name one.

    Args:
        model: the model of a trainer.
    """
    found = getattr(getattr(model, "config", None), "pad_token_id", None)
    return found if isinstance(found, int) else 0


def form_of(inputs: Mapping[str, Any], is_pairs: bool, pad_token_id: int) -> Form | None:
    """How inputs are made of rows; None if some tensor has another number of entries.

    Args:
        inputs: the inputs of one micro-batch of a trainer.
        is_pairs: whether a row is a pair.
        pad_token_id: the token of padding.
    """
    rows = rows_of(inputs, is_pairs)
    halves, scalars = set(), set()
    for name, leaf in inputs.items():
        if not isinstance(leaf, torch.Tensor):
            continue
        if not leaf.dim():
            scalars.add(name)
        elif is_pairs and leaf.shape[0] == 2 * rows:
            halves.add(name)
        elif leaf.shape[0] != rows:
            return None
    return Form(is_pairs, frozenset(halves), frozenset(scalars), pad_token_id)


def rows_of(inputs: Mapping[str, Any], is_pairs: bool) -> int:
    """The number of rows, or of pairs.

    Args:
        inputs: the inputs of one micro-batch of a trainer.
        is_pairs: whether a row is a pair.

    Raises:
        ValueError: no tensor has rows.
    """
    sizes = [x.shape[0] for x in inputs.values() if isinstance(x, torch.Tensor) and x.dim()]
    if not sizes:
        raise ValueError(
            "The inputs of a trainer must have rows. "
            f"Got {', '.join(inputs) or 'no inputs'}, and no tensor with rows. "
            "Return tensors from the data collator."
        )
    return max(sizes) // 2 if is_pairs else sizes[0]


def joined(batches: Sequence[Mapping[str, Any]], form: Form) -> dict[str, Any]:
    """Joins batches into one, padded to the longest batch, on the side of their own padding.

    Labels are padded with -100, tokens with the model's padding token, and all else with 0.

    Args:
        batches: results of `Form.by_row`.
        form: the form of all batches.

    Raises:
        ValueError: tensors cannot be joined, or names or values for all rows differ.
    """
    first = batches[0]
    if len(batches) == 1:
        return dict(first)
    for other in batches:
        if other.keys() != first.keys():
            raise ValueError(
                "The batches of an update must be alike. "
                f"Got {', '.join(first)} in one, and {', '.join(other)} in another. "
                "Return the same names from the data collator, such as weights of 1."
            )
    on_left = _padded_on_left(batches)
    found = {}
    for name, leaf in first.items():
        leaves: list[Any] = [batch.get(name) for batch in batches]
        if name in form.scalars:
            _check_same(name, [x[0] for x in leaves])
        if isinstance(leaf, torch.Tensor):
            fill = form.pad_token_id if name in _IDS else _FILLS.get(name, 0)
            if name == "attention_mask" and name not in form.halves:
                _check_mask(leaves)
            found[name] = torch.cat(_padded(name, leaves, fill, name in on_left))
        elif isinstance(leaf, list) and all(isinstance(x, list) for x in leaves):
            found[name] = [item for x in leaves for item in x]
        elif isinstance(leaf, Mapping):
            raise ValueError(
                "Batches are put together from tensors and lists. "
                f"Got {name} as a {type(leaf).__name__}. Leave microbatch_size out, or return "
                "its entries one by one from the data collator."
            )
        elif all(x == leaf for x in leaves):
            found[name] = leaf
        else:
            raise _differing(name, leaf, next(x for x in leaves if x != leaf))
    return found


def _check_same(name: str, scalars: Sequence[torch.Tensor]) -> None:
    """Refuses a tensor without rows that differs, such as GRPO's count of generated tokens."""
    first = scalars[0]
    for other in scalars[1:]:
        # GRPO's batches share one tensor. Reading its value would wait for the device.
        if other.data_ptr() != first.data_ptr() and not torch.equal(other, first):
            raise _differing(name, first.tolist(), other.tolist())


def _check_mask(masks: Sequence[Any]) -> None:
    """Refuses to pad masks of queries and keys, in which a 0 may mean that a key is visible."""
    shapes = [tuple(x.shape[1:]) for x in masks if isinstance(x, torch.Tensor)]
    if any(len(shape) > 1 and shape != shapes[0] for shape in shapes):
        raise ValueError(
            "A mask of more than two axes cannot be padded. "
            f"Got attention_mask of {shapes[0]} for a row in one batch, and of other sizes in "
            "another. Leave microbatch_size out, or pad all rows to one length."
        )


def _differing(name: str, one: Any, other: Any) -> ValueError:
    return ValueError(
        "Inputs that belong to all rows must be the same in all batches of an update. Got "
        f"{name}={one!r} in one and {name}={other!r} in another. Leave microbatch_size out; in "
        "GRPO, generate the rows of an update together, with steps_per_generation."
    )


def _padded_on_left(batches: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the tensors that are padded on the left, as the masks of all batches show."""
    masks = [batch.get("attention_mask") for batch in batches]
    if not all(isinstance(mask, torch.Tensor) and mask.dim() == 2 for mask in masks):
        return set(_LEFT)
    is_left = all(bool((mask[:, -1] != 0).all()) for mask in masks if mask is not None) and any(
        bool((mask[:, 0] == 0).any()) for mask in masks if mask is not None
    )
    if not is_left:
        return set(_LEFT)
    shapes = [(batch, batch["attention_mask"].shape) for batch in batches]
    alike = {
        name
        for name in batches[0]
        if all(
            isinstance(batch[name], torch.Tensor) and batch[name].shape[:2] == shape
            for batch, shape in shapes
        )
    }
    return {*_LEFT, *alike}


def _padded(name: str, leaves: Sequence[Any], fill: int, on_left: bool) -> list[torch.Tensor]:
    if not all(isinstance(x, torch.Tensor) and x.dim() == leaves[0].dim() for x in leaves):
        raise ValueError(
            "The batches of an update must be alike. "
            f"Got {name} as a tensor of {leaves[0].dim()} axes in one, and not in another. "
            "Leave microbatch_size out, or return the same from the data collator."
        )
    sizes = [max(x.shape[axis] for x in leaves) for axis in range(1, leaves[0].dim())]
    found = []
    for leaf in leaves:
        if list(leaf.shape[1:]) != sizes:
            wide = leaf.new_full((leaf.shape[0], *sizes), fill)
            own = [slice(n) for n in leaf.shape]
            if on_left:
                own[1] = slice(sizes[0] - leaf.shape[1], None)
            wide[tuple(own)] = leaf
            leaf = wide
        found.append(leaf)
    return found
