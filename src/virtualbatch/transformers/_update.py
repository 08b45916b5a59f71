"""The rows of an update, and how the inputs of a micro-batch are made of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from virtualbatch.plan.auto import Auto
from virtualbatch.torch._batch import ReadBatch, read
from virtualbatch.torch._microbatch import known_rows
from virtualbatch.transformers._padding import Padded, padded, trimmed
from virtualbatch.transformers._rows import Form, form_of, joined, pad_token_id_of, rows_of
from virtualbatch.window.packing import token_cut
from virtualbatch.window.window import Window

# Enough rows for the largest trial: two parts of four rows.
_ENOUGH = 8


class Asked(NamedTuple):
    """The options of `accumulate`.

    Fields:
        microbatch_size: rows, "auto" or an `Auto`; None if no size is given.
        microbatch_tokens: the largest product of rows and longest row; None if not given.
        weight: inputs of a micro-batch -> what its loss was divided by; None to find it.
        accumulator_dtype: see `virtualbatch.torch.backward`.
    """

    microbatch_size: int | str | Auto | None = None
    microbatch_tokens: int | None = None
    weight: Callable[[Mapping[str, Any]], Any] | None = None
    accumulator_dtype: str | None = None

    @property
    def has_cut(self) -> bool:
        """Whether a size is given. Otherwise the trainer's batches are the micro-batches."""
        return self.microbatch_size is not None or self.microbatch_tokens is not None


class UpdateRows(NamedTuple):
    """The rows of an update, and how the inputs of a micro-batch are made of them.

    Fields:
        batch: the batch that the engine cuts, or a Window.
        form: the form of the inputs; None if they are used as they are.
        padded: groups of names; the tensors of a group are padded together. Empty if nothing is
            trimmed.
    """

    batch: Any
    form: Form | None
    padded: tuple[tuple[str, ...], ...]

    def inputs(self, microbatch: Any) -> dict[str, Any]:
        """The inputs of a micro-batch, as the trainer has them: a new dict."""
        if self.form is None:
            return dict(microbatch["inputs"])
        inputs = self.form.inputs(microbatch["inputs"])
        return trimmed(
            inputs, self.padded, [microbatch["lengths"][name[0]] for name in self.padded]
        )


def rows_of_update(
    batches: Sequence[Mapping[str, Any]], asked: Asked, is_pairs: bool, model: Any
) -> UpdateRows:
    """The rows of an update.

    Args:
        batches: the inputs of its batches, as the trainer has prepared them.
        asked: the options of `accumulate`.
        is_pairs: whether a row is a pair.
        model: the trainer's model, whose configuration says how rows are padded.

    Raises:
        ValueError: a size is given, but the inputs have no common rows.
    """
    pad_token_id = pad_token_id_of(model)
    forms = [form_of(batch, is_pairs, pad_token_id) for batch in batches]
    form = forms[0]
    if form is None or any(each != form for each in forms):
        if asked.has_cut:
            raise ValueError(_no_common_rows(batches, is_pairs))
        return UpdateRows(Window({"inputs": dict(batch)} for batch in batches), None, ())
    if not asked.has_cut:
        return UpdateRows(Window({"inputs": form.by_row(batch)} for batch in batches), form, ())
    rows = joined([form.by_row(batch) for batch in batches], form)
    config = getattr(model, "config", None)
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    groups = [g for g in padded(form.inputs(rows), form, is_encoder_decoder) if g.names]
    lengths = {group.names[0]: group.lengths for group in groups}
    names = tuple(group.names for group in groups)
    if asked.microbatch_tokens is None:
        return UpdateRows({"inputs": rows, "lengths": lengths}, form, names)
    return UpdateRows(_packed(rows, groups, form, asked.microbatch_tokens), form, names)


def with_enough_rows(batch: ReadBatch, form: Form | None, unlike: Sequence[int]) -> ReadBatch:
    """Joins rows of several micro-batches, if no micro-batch alone can distinguish the weights.

    Args:
        batch: a window with known rows.
        form: the form of its inputs.
        unlike: the numbers of micro-batches in which weights differ; may be empty.
    """
    is_enough = max(map(known_rows, batch.given)) >= _ENOUGH and not unlike
    if form is None or not batch.is_window or is_enough:
        return batch
    some: list[Any] = []
    rows = 0
    for index in dict.fromkeys([*unlike, *range(len(batch.given))]):
        if rows < _ENOUGH or index in unlike:
            some.append(batch.given[index].get())
            rows += known_rows(batch.given[index])
    lengths = {
        name: [length for each in some for length in each["lengths"][name]]
        for name in some[0].get("lengths", ())
    }
    try:
        inputs = joined([each["inputs"] for each in some], form)
    except ValueError:
        # Batches that cannot be joined run as they are, so they are tried as they are.
        return batch
    found = read(Window([{"inputs": inputs, "lengths": lengths}]), weighted=True)
    return found if found.can_be_cut else batch


def _packed(
    rows: Mapping[str, Any], groups: Sequence[Padded], form: Form, microbatch_tokens: int
) -> Window:
    """Rows sorted by length, and cut by tokens."""
    if not any("attention_mask" in group.names for group in groups):
        raise ValueError(
            "Packing needs attention_mask, padding on the right, and a loss that ignores padding, "
            f"unlike that of question answering. Got inputs {', '.join(rows)}. Pass "
            "microbatch_size instead."
        )
    of_row = [sum(each) for each in zip(*(group.lengths for group in groups), strict=True)]
    order = sorted(range(len(of_row)), key=lambda row: -of_row[row])
    tokens = microbatch_tokens // 2 if form.is_pairs else microbatch_tokens
    pieces = token_cut([of_row[row] for row in order], max(tokens, 1), max(of_row), None)
    return Window(
        (
            {
                "inputs": {
                    name: _chosen(leaf, order[p.start : p.stop]) for name, leaf in rows.items()
                },
                "lengths": {
                    group.names[0]: [group.lengths[row] for row in order[p.start : p.stop]]
                    for group in groups
                },
            }
            for p in pieces
        ),
        sorted_rows=True,
    )


def _chosen(leaf: Any, rows: Sequence[int]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.index_select(0, torch.tensor(rows, device=leaf.device))
    return [leaf[row] for row in rows] if isinstance(leaf, list) else leaf


def _no_common_rows(batches: Sequence[Mapping[str, Any]], is_pairs: bool) -> str:
    first = batches[0]
    rows = rows_of(first, is_pairs)
    odd = [
        f"{name} with {leaf.shape[0]} entries for {rows} {'pairs' if is_pairs else 'rows'}"
        for name, leaf in first.items()
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] not in (rows, 2 * rows)
    ]
    got = ", ".join(odd) or "batches with different inputs"
    return (
        f"A batch must be cut by rows. Got {got}. Leave microbatch_size and microbatch_tokens out: "
        "accumulate(trainer) takes the trainer's own batches as micro-batches."
    )
