"""Each update of a trainer is that of its whole batch, for every head, window and cut.

The oracle is the trainer itself, given the 20 rows of an update at once, in float64.
"""

import pytest
import torch
from tests.transformers.training import HEADS, collated, error, loss_error, run, trained, trainer_of

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
