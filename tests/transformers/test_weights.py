"""What a loss was divided by is found, and proved, or the loss is refused: nothing in between."""

import logging

import pytest
import torch
import torch.nn.functional as F
from tests.transformers.heads import CLASS_WEIGHTS, OTHERS, RowMeans, stacked
from tests.transformers.training import (
    collated,
    error,
    loss_error,
    rows_of,
    trained,
    trainer_of,
)
from transformers import Trainer

from virtualbatch.transformers import accumulate

# Head -> (largest error, its own way's smallest).
FOUND = {
    "vit": (1e-11, None),
    "multiple choice": (1e-11, 0.1),
    "answers": (1e-11, None),
    "ctc": (1e-6, None),
    "experts": (1e-5, None),
    "row means": (1e-11, 0.1),
    "sum": (1e-11, None),
}
REFUSED = (
    "class weights",
    "contrastive",
    "two means",
    "pretraining",
    "ignored answers",
    "ignored labels",
    "balanced experts",
)
GIVEN = {
    "class weights": lambda inputs: CLASS_WEIGHTS[inputs["labels"]].sum(),
    "ignored labels": lambda inputs: ((inputs["labels"] >= 0) & (inputs["labels"] != 255)).sum(),
}


def made(name, batch, steps, ours=None):
    """The trainer of a head, in the dtype of its default."""
    head = OTHERS[name]
    torch.set_default_dtype(head.dtype)
    torch.manual_seed(0)
    trainer = trainer_of(
        *(None, batch, steps),
        cls=head.cls,
        model=head.model(),
        rows=head.rows(),
        remove_unused_columns=False,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=0.05,
        num_train_epochs=1,
    )
    trainer.data_collator = stacked if head.is_stacked else collated
    return trainer if ours is None else accumulate(trainer, **ours)


def run(*given):
    return trained(made(*given))


@pytest.mark.parametrize("name", FOUND)
def test_a_weight_is_found(name):
    tolerance, own_is_off = FOUND[name]
    uncut = run(name, 10, 1)
    for batch, steps, ours in ((2, 5, {}), (10, 1, {"microbatch_size": 3})):
        found = run(name, batch, steps, ours)
        assert error(found, uncut) < tolerance
        # In units of the loss: what is float32 inside rounds as that.
        assert loss_error(found, uncut) < max(1e-12, tolerance * abs(uncut.losses[0]))
    if own_is_off is not None:
        assert error(run(name, 2, 5), uncut) > own_is_off


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_no_weight_puts_together_is_refused(name):
    """Before anything is written: the weights are those before training."""
    trainer = made(name, 10, 1)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match="one mean or sum over rows or over labels that count"):
        accumulate(trainer, microbatch_size=3).train()
    after = trainer.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("name", GIVEN)
def test_a_weight_that_is_given_is_used(name, caplog):
    uncut = run(name, 10, 1)
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = run(name, 10, 1, {"microbatch_size": 3, "weight": GIVEN[name]})
    assert error(found, uncut) < 1e-11
    assert error(run(name, 2, 5), uncut) > 0.1
    assert "does not fit" not in caplog.text


def test_a_given_weight_that_does_not_fit_is_logged_and_used(caplog):
    """As with the balance loss of experts, which is then that of micro-batches."""
    weight = {"weight": lambda inputs: (inputs["labels"][:, 1:] != -100).sum()}
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        found = run("balanced experts", 10, 1, {"microbatch_size": 3, **weight})
    assert caplog.text.count("does not fit the loss, and is used all the same") == 1
    uncut, own = run("balanced experts", 10, 1), run("balanced experts", 2, 5)
    assert error(found, uncut) < error(own, uncut)


@pytest.mark.parametrize("is_by_rows", [True, False])
def test_a_first_window_of_equal_rows_decides_nothing_for_good(is_by_rows):
    """Rows and labels are in proportion in two windows, and not in the third."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in [*[9] * 20, 3, 12, 5, 16, 4, 7, 15, 3, 6, 14]:
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})

    def of(batch, steps, ours=None):
        trainer = trainer_of(
            *("llama", batch, steps),
            rows=rows,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            **({"cls": RowMeans} if is_by_rows else {}),
        )
        if ours is not None:
            accumulate(trainer, **ours)
        return trained(trainer)

    uncut = of(10, 1)
    assert error(of(10, 1, {"microbatch_size": 3}), uncut) < 1e-11
    assert error(of(2, 5, {}), uncut) < 1e-11
    if is_by_rows:
        # What the first window would have been taken for.
        by_count = {"weight": lambda inputs: (inputs["labels"][:, 1:] != -100).sum()}
        assert error(of(10, 1, {"microbatch_size": 3, **by_count}), uncut) > 0.01


@pytest.mark.parametrize(
    ("batch", "steps", "ours"), [(2, 5, {}), (10, 1, {"microbatch_tokens": 40})], ids=str
)
def test_one_row_that_is_unlike_the_others_is_among_those_that_are_tried(batch, steps, ours):
    """Its micro-batch is neither the first nor the largest."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in [9] * 7 + [3] + [9] * 2:
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})

    def of(batch, steps):
        order = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
        return trainer_of("llama", batch, steps, cls=RowMeans, rows=rows, **order)

    uncut = trained(of(10, 1))
    assert error(trained(accumulate(of(batch, steps), **ours)), uncut) < 1e-11


class TokensAndRows(Trainer):
    """A mean over tokens and one over rows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        return tokens + 0.3 * logits[:, 0].square().mean()


def test_two_means_are_no_loss_whose_rows_belong_together():
    """The first rows are alike, so that they say nothing of either."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in [9] * 13 + [3] + [9] * 2:
        ids = torch.randint(3, 60, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    order = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    trainer = trainer_of("llama", 16, 1, cls=TokensAndRows, rows=rows, **order)
    with pytest.raises(ValueError, match="one mean or sum over rows or over labels that count"):
        accumulate(trainer, microbatch_size=4).train()


class LabelledRowMeans(Trainer):
    """Rows without labels count nothing, and are counted out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        counts = (labels != -100).sum(1)
        return (losses.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum()


@pytest.mark.parametrize(("batch", "steps", "ours"), [(10, 1, {"microbatch_size": 3}), (2, 5, {})])
def test_rows_without_labels_tell_whether_they_are_counted(batch, steps, ours):
    """There is none in the first update, and one in the second."""
    rows = rows_of("tokens", 20)
    rows[13]["labels"] = [-100] * len(rows[13]["labels"])

    def of(batch, steps):
        order = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
        return trainer_of("llama", batch, steps, cls=LabelledRowMeans, rows=rows, **order)

    uncut = trained(of(10, 1))
    assert error(trained(accumulate(of(batch, steps), **ours)), uncut) < 1e-11


def test_a_first_window_of_one_class_does_not_hide_their_weights():
    """It looks like a mean over rows, which the eighth window no longer does."""
    rows = OTHERS["class weights"].rows()
    rows = [row | {"labels": 2 if number in (15, 17) else 0} for number, row in enumerate(rows)]
    trainer = trainer_of(
        *("sequence", 2, 1),
        cls=OTHERS["class weights"].cls,
        rows=rows,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
    )
    with pytest.raises(ValueError, match="one mean or sum over rows or over labels that count"):
        accumulate(trainer, microbatch_size=1).train()
    assert trainer.state.global_step == 7
