"""What accumulate refuses, before anything of the trainer is changed."""

import pytest
import torch
from tests.transformers.training import run, trainer_of
from transformers import Trainer, TrainerCallback

from virtualbatch.transformers import _checks, accumulate, restore


def refused(trainer, words, **given):
    before = dict(vars(trainer))
    with pytest.raises(ValueError, match=words):
        accumulate(trainer, **given)
    assert vars(trainer) == before


def named(name, base=Trainer):
    return type(name, (base,), {})


def test_what_is_no_trainer():
    with pytest.raises(TypeError, match=r"Got Linear\. Pass the trainer"):
        accumulate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed accumulates in its own engine"),
        ({"is_fsdp_enabled": True}, "FSDP through the Trainer is not supported"),
    ],
)
def test_engines_that_accumulate_or_shard_by_themselves(change, words):
    trainer = trainer_of("masked", 4, 5)
    vars(trainer).update(change)
    refused(trainer, words)


def test_a_batch_that_is_split_over_devices_by_one_process():
    trainer = trainer_of("masked", 4, 5)
    trainer.args._n_gpu = 4
    refused(trainer, "Got n_gpu=4. Start one process per device")


def test_optimizers_inside_the_backward_pass():
    trainer = trainer_of("masked", 4, 5)
    trainer.args.optim = "lomo"
    refused(trainer, "steps inside the backward pass")


def test_losses_that_compare_rows_later():
    """Their first updates look like means over rows."""
    trainer = trainer_of("masked", 4, 5, cls=named("KTOTrainer"))
    trainer.loss_type = "kto"
    refused(trainer, "mean KL, so a cut changes it. Got loss_type='kto'")
    trainer.loss_type = "apo_zero_unpaired"
    restore(accumulate(trainer))
    trainer = trainer_of("masked", 4, 5, cls=named("DPOTrainer"))
    trainer.loss_type = ["sigmoid", "aot_pair"]
    refused(trainer, "sorts the rows of a batch")


def test_two_cuts_and_two_calls():
    trainer = trainer_of("masked", 4, 5)
    refused(trainer, "Leave one out", microbatch_size=2, microbatch_tokens=64)
    accumulate(trainer)
    refused(trainer, "Call restore first")


@pytest.mark.parametrize("size", [0, -3, 2.5, "all"])
def test_sizes_that_no_batch_could_satisfy(size):
    refused(trainer_of("masked", 4, 5), "microbatch_size", microbatch_size=size)


@pytest.mark.parametrize("tokens", [0, -3, 2.5])
def test_tokens_that_no_row_could_satisfy(tokens):
    refused(trainer_of("masked", 4, 5), "microbatch_tokens", microbatch_tokens=tokens)


def test_a_release_that_does_not_say_whether_its_loss_is_scaled(monkeypatch):
    monkeypatch.setattr(_checks, "version", lambda name: "5.18.2")
    refused(trainer_of("masked", 4, 5), "transformers 5.19 or newer")


class Twice(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.compute_loss(model, dict(inputs))
        return super().training_step(model, inputs, num_items_in_batch)


class Never(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.zeros(())


@pytest.mark.parametrize(("cls", "calls"), [(Twice, 2), (Never, 0)])
def test_steps_that_do_not_call_the_loss_once(cls, calls):
    with pytest.raises(ValueError, match=f"Got {calls} calls"):
        run("masked", 4, 1, {}, cls=cls)


class Flat(Trainer):
    """Inputs as vision models pack them: as many pixels as all images of a batch have together."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs.pop("pixels")
        return (
            super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            + pixels.sum() * 0
        )


def test_inputs_without_common_rows_are_taken_as_they_are_or_refused():
    def with_pixels(trainer):
        collated = trainer.data_collator
        trainer.data_collator = lambda rows: collated(rows) | {"pixels": torch.ones(37)}
        trainer.args.remove_unused_columns = False
        return trainer

    def of(ours=None):
        trainer = with_pixels(trainer_of("masked", 4, 5, cls=Flat, num_train_epochs=1))
        return trainer if ours is None else accumulate(trainer, **ours)

    with pytest.raises(ValueError, match="Got pixels with 37 entries for 4 rows"):
        of({"microbatch_size": 2}).train()
    uncut = with_pixels(trainer_of("masked", 20, 1, cls=Flat, num_train_epochs=1))
    uncut.train()
    found = of({})
    found.train()
    for a, b in zip(found.model.parameters(), uncut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_packing_without_a_mask():
    trainer = trainer_of("masked", 20, 1, num_train_epochs=1)
    collated = trainer.data_collator
    trainer.data_collator = lambda rows: {
        name: x for name, x in collated(rows).items() if name != "attention_mask"
    }
    with pytest.raises(ValueError, match="Packing needs attention_mask, padding on the right"):
        accumulate(trainer, microbatch_tokens=48).train()


def with_collator(batch, steps, change, **more):
    trainer = trainer_of("sequence", batch, steps, num_train_epochs=1, **more)
    collated = trainer.data_collator
    trainer.data_collator = lambda rows: change(collated(rows))
    trainer.args.remove_unused_columns = False
    return trainer


def test_batches_of_an_update_with_different_names():
    """What the first of them has not would be left out of all."""
    batches = iter(range(100))
    some = with_collator(
        4, 5, lambda found: found | ({"weights": torch.ones(4)} if next(batches) else {})
    )
    with pytest.raises(ValueError, match=r"alike\. Got .*labels in one, and .*weights in another"):
        accumulate(some, microbatch_size=7).train()


def test_masks_of_more_than_two_axes_are_not_padded():
    """0 may mean that a key is seen."""

    def wide(found):
        mask = found["attention_mask"]
        seen = mask[:, None, None].expand(-1, 1, mask.shape[1], -1)
        return found | {"attention_mask": (1.0 - seen) * torch.finfo(torch.float64).min}

    with pytest.raises(ValueError, match=r"axes cannot be padded\. Got attention_mask of \(1, "):
        accumulate(with_collator(4, 5, wide), microbatch_size=7).train()


def test_inputs_without_names():
    with pytest.raises(TypeError, match=r"must have names\. Got a tuple in Trainer"):
        accumulate(with_collator(4, 5, lambda found: tuple(found.values()))).train()


class Changes(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        args.gradient_accumulation_steps = 4


def test_a_number_of_batches_that_changes_within_an_epoch():
    """The trainer steps in the middle of what it has fetched, before anything has run."""
    trainer = trainer_of("sequence", 4, 2)
    trainer.add_callback(Changes())
    with pytest.raises(ValueError, match="gradient_accumulation_steps was changed within an epoch"):
        accumulate(trainer).train()
    assert trainer.state.global_step == 1
