"""Each update of a trainer is that of its whole batch, for every head, window and cut.

The oracle is the trainer itself, given the 20 rows of an update at once, in float64.
"""

import pytest
import torch
from tests.transformers.training import (
    HEADS,
    bert,
    collated,
    error,
    loss_error,
    model_of,
    rows_of,
    run,
    trained,
    trainer_of,
)
from transformers import BertForQuestionAnswering

from virtualbatch.transformers import accumulate

# Heads whose own accumulation is right, because they divide by what the trainer counts.
RIGHT = ("llama", "gpt2")
# (rows, batches an update, arguments of accumulate)
CUTS = {
    "window": (4, 5, {}),
    "cut": (20, 1, {"microbatch_size": 4}),
    "packed": (20, 1, {"microbatch_tokens": 48}),
    "window packed": (4, 5, {"microbatch_tokens": 48}),
    "window cut larger": (4, 5, {"microbatch_size": 7}),
    "single rows": (20, 1, {"microbatch_size": 1}),
}
QUICK = ("window", "packed")


@pytest.fixture(scope="module")
def uncut():
    """Head -> its training with whole batches, run once."""
    found = {}

    def of(head, epochs):
        if (head, epochs) not in found:
            found[head, epochs] = run(head, 20, 1, num_train_epochs=epochs)
        return found[head, epochs]

    return of


@pytest.mark.parametrize("head", HEADS)
def test_own_accumulation_is_wrong_where_heads_ignore_the_count(head, uncut):
    own = run(head, 4, 5, num_train_epochs=1)
    assert (error(own, uncut(head, 1)) < 1e-11) == (head in RIGHT)
    if head not in RIGHT:
        assert error(own, uncut(head, 1)) > 0.1


@pytest.mark.parametrize("cut", QUICK)
@pytest.mark.parametrize("head", HEADS)
def test_an_epoch_is_that_of_whole_batches(head, cut, uncut):
    batch, steps, ours = CUTS[cut]
    found = run(head, batch, steps, ours, num_train_epochs=1)
    assert error(found, uncut(head, 1)) < 1e-11
    assert loss_error(found, uncut(head, 1)) < 1e-12


@pytest.mark.thorough("two epochs of ten heads, six cuts each")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("head", HEADS)
def test_two_epochs_are_those_of_whole_batches(head, cut, uncut):
    batch, steps, ours = CUTS[cut]
    found = run(head, batch, steps, ours)
    assert error(found, uncut(head, 2)) < 1e-11
    assert loss_error(found, uncut(head, 2)) < 1e-12


def test_rows_padded_to_one_length_are_trimmed_and_change_nothing(uncut):
    """A collator that pads to 32 columns, where no row has more than 16 tokens."""
    seen = []

    def forward(module, args, kwargs):
        seen.append(kwargs["input_ids"].shape[1])

    def wide(rows):
        found = collated(rows)
        more = 32 - found["input_ids"].shape[1]
        fills = {"labels": -100}
        return {
            name: torch.nn.functional.pad(x, (0, more), value=fills.get(name, 0))
            for name, x in found.items()
        }

    trainer = trainer_of("masked", 20, 1, num_train_epochs=1)
    trainer.data_collator = wide
    trainer.model.register_forward_pre_hook(forward, with_kwargs=True)
    found = trained(accumulate(trainer, microbatch_size=4))
    assert error(found, uncut("masked", 1)) < 1e-11
    assert max(seen) <= 16


def test_padding_that_is_learned_is_not_trimmed():
    """As with a tokenizer whose padding is its end of text, and labels that are the tokens."""

    def of(ours=None):
        trainer = trainer_of("llama", 20, 1, num_train_epochs=1)
        trainer.data_collator = lambda rows: counted_padding(collated(rows))
        return trained(trainer if ours is None else accumulate(trainer, **ours))

    def counted_padding(batch):
        return batch | {"labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 1)}

    found = of()
    assert error(of({"microbatch_size": 4}), found) < 1e-11
    assert error(of({"microbatch_tokens": 64}), found) < 1e-11


def shifted(rows, fill):
    """Rows padded in front of them."""
    found = collated(rows)
    found["input_ids"][found["attention_mask"] == 0] = fill
    for name in [name for name, x in found.items() if x.dim() == 2]:
        for row, mask in enumerate(found["attention_mask"].sum(1)):
            found[name][row] = found[name][row].roll(-int(mask), 0)
    return found


@pytest.mark.parametrize("ours", [{"microbatch_size": 7}, {"microbatch_tokens": 48}], ids=str)
def test_batches_that_are_padded_on_the_left_are_put_together_so(ours):
    """Positions of GPT-2 begin at the padding."""

    def of(batch, steps):
        trainer = trainer_of("gpt2", batch, steps, num_train_epochs=1)
        trainer.data_collator = lambda rows: shifted(rows, 0)
        return trainer

    found = trained(accumulate(of(4, 5), **ours))
    assert error(found, trained(of(20, 1))) < 1e-11


def test_batches_are_put_together_with_the_padding_of_the_model():
    """The head of Llama reads the last token that is none."""

    def of(batch, steps):
        model = model_of("llama-sequence")
        model.config.pad_token_id = 2
        trainer = trainer_of("llama-sequence", batch, steps, model=model, num_train_epochs=1)

        def with_twos(rows):
            found = collated(rows)
            found["input_ids"][found["attention_mask"] == 0] = 2
            return found

        trainer.data_collator = with_twos
        return trainer

    found = trained(accumulate(of(4, 5), microbatch_size=7))
    assert error(found, trained(of(20, 1))) < 1e-11


def test_columns_among_which_an_answer_is_looked_for_are_kept():
    """The softmax of a question's answer is over padding as well."""

    def answers(rows):
        found = collated(rows)
        start = found.pop("labels") % 3
        return found | {"start_positions": start, "end_positions": start}

    def of(ours=None):
        torch.manual_seed(0)
        trainer = trainer_of(
            *(None, 20, 1),
            model=bert(BertForQuestionAnswering),
            rows=rows_of("class"),
            remove_unused_columns=False,
            num_train_epochs=1,
            # Its last bias moves nothing, and Adam would scale the rounding of that up.
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.data_collator = answers
        return trained(trainer if ours is None else accumulate(trainer, **ours))

    assert error(of({"microbatch_size": 4}), of()) < 1e-11
