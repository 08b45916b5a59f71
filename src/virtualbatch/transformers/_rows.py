"""What is one row in the inputs of a trainer: an entry of each tensor, or a pair of entries."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

# What padding holds, where it is not 0.
_FILLS = {"labels": -100, "shift_labels": -100}
# What something else follows in a row, so that padding behind it would move that away.
_LEFT = ("prompt_ids", "prompt_mask")


class Form(NamedTuple):
    """How the inputs of one micro-batch are made of rows.

    Fields:
        is_pairs: whether a row is a pair: the chosen rows first, then as many rejected ones.
        halves: names of the tensors that hold both; others have one entry for each pair.
        scalars: names of the tensors without rows, which are the same for all rows.
    """

    is_pairs: bool
    halves: frozenset[str]
    scalars: frozenset[str]

    def by_row(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs with one entry per row in each tensor; views where that is possible.

        Args:
            inputs: as a trainer has them.
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
        """The inputs of some rows, as a trainer has them. A new dict, which may be changed.

        Args:
            rows: what `by_row` gave, cut.
        """
        found = dict(rows)
        for name in self.halves:
            leaf = rows[name].transpose(0, 1)
            found[name] = leaf.reshape(-1, *leaf.shape[2:])
        for name in self.scalars:
            found[name] = rows[name][0]
        return found


def form_of(inputs: Mapping[str, Any], is_pairs: bool) -> Form | None:
    """How inputs are made of rows; None if some tensor has another number of entries.

    Args:
        inputs: of one micro-batch of a trainer.
        is_pairs: whether a row is a pair.
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
    return Form(is_pairs, frozenset(halves), frozenset(scalars))


def rows_of(inputs: Mapping[str, Any], is_pairs: bool) -> int:
    """The number of rows, or of pairs.

    Args:
        inputs: of one micro-batch of a trainer.
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
    """Batches in one, padded to the longest of them: labels with -100, all else with 0.

    Args:
        batches: what `Form.by_row` gave, with the same names.
        form: of all of them.

    Raises:
        ValueError: tensors cannot be put together, or a value for all rows differs.
    """
    first = batches[0]
    if len(batches) == 1:
        return dict(first)
    found = {}
    for name, leaf in first.items():
        leaves: list[Any] = [batch.get(name) for batch in batches]
        if name in form.scalars:
            _check_same(name, [x[0] for x in leaves])
        if isinstance(leaf, torch.Tensor):
            found[name] = torch.cat(_padded(name, leaves))
        elif isinstance(leaf, list) and all(isinstance(x, list) for x in leaves):
            found[name] = [item for x in leaves for item in x]
        elif all(x == leaf for x in leaves):
            found[name] = leaf
        else:
            raise _differing(name, leaf, next(x for x in leaves if x != leaf))
    return found


def _check_same(name: str, scalars: Sequence[torch.Tensor]) -> None:
    """Refuses a tensor without rows that differs, such as GRPO's count of generated tokens."""
    first = scalars[0]
    for other in scalars[1:]:
        # GRPO's batches share one tensor, and asking for its value would wait for the device.
        if other.data_ptr() != first.data_ptr() and not torch.equal(other, first):
            raise _differing(name, first.tolist(), other.tolist())


def _differing(name: str, one: Any, other: Any) -> ValueError:
    return ValueError(
        "What belongs to all rows must be the same in all batches of an update. "
        f"Got {name}={one!r} in one and {name}={other!r} in another. "
        "Leave microbatch_size out; in GRPO, generate the rows of an update together, with "
        "steps_per_generation."
    )


def _padded(name: str, leaves: Sequence[Any]) -> list[torch.Tensor]:
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
            wide = leaf.new_full((leaf.shape[0], *sizes), _FILLS.get(name, 0))
            own = [slice(n) for n in leaf.shape]
            if name in _LEFT:
                own[1] = slice(sizes[0] - leaf.shape[1], None)
            wide[tuple(own)] = leaf
            leaf = wide
        found.append(leaf)
    return found
