"""A trainer's own update is certified beside ours, and nothing of it changes."""

import pytest
import torch
from tests.transformers.heads import ClassWeighted
from tests.transformers.training import HEADS, run, trained, trainer_of, weights_of
from transformers import Trainer

from virtualbatch.transformers import accumulate, certify


@pytest.mark.parametrize(
    ("head", "is_own_exact"), [("llama", True), ("masked", False), ("t5", False)]
)
def test_the_own_way_and_ours_are_told_apart(head, is_own_exact):
    found = certify(trainer_of(head, 4, 5))
    assert found.own.exact == is_own_exact
    assert found.accumulated.exact
    assert set(found.own.parameters) == {name for name, _ in HEADS[head][0]().named_parameters()}
    if not is_own_exact:
        assert found.own.max_error > 0.05
        assert "accumulate(trainer)" in found.own.findings[0].fix
        assert "NOT exact" in str(found)
        with pytest.raises(ValueError, match="NOT exact"):
            found.own.raise_if_inexact()


def test_training_goes_on_as_if_it_had_not_been_called():
    """Weights after training, gradients, random numbers, dropout: all to the bit."""
    plain = run("masked", 4, 5, num_train_epochs=1)
    trainer = trainer_of("masked", 4, 5, num_train_epochs=1)
    attributes = {name: id(value) for name, value in vars(trainer).items()}
    before = weights_of(trainer.model)
    certify(trainer)
    assert torch.equal(weights_of(trainer.model), before)
    assert {name: id(value) for name, value in vars(trainer).items()} == attributes
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert torch.equal(trained(trainer).weights, plain.weights)


def test_dropout_rests():
    """Two cuts draw other masks, so that nothing could be compared."""
    trainer = trainer_of("masked", 4, 5)
    for layer in trainer.model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    found = certify(trainer)
    assert found.accumulated.exact
    assert found.own.max_error > 0.05


class Noisy(Trainer):
    """Draws numbers that no layer draws, others for each micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * (1 + torch.rand(()))


def test_noise_is_no_rounding():
    """It is the same in no two ways, and so none of them is certified."""
    trainer = trainer_of("masked", 4, 5, cls=Noisy)
    accumulate(trainer, weight=lambda inputs: (inputs["labels"] != -100).sum())
    found = certify(trainer)
    assert not found.own.exact
    assert not found.accumulated.exact


def test_arguments_of_accumulate_are_used():
    weight = {"weight": lambda inputs: torch.tensor(1.0)}
    trainer = trainer_of("masked", 4, 5)
    accumulate(trainer, microbatch_size=3, **weight)
    found = certify(trainer)
    assert not found.accumulated.exact
    assert "training_step" in vars(trainer)


def test_a_loss_that_cannot_be_cut_is_refused_as_in_training():
    with pytest.raises(ValueError, match="one mean or sum over rows"):
        certify(trainer_of("sequence", 4, 5, cls=ClassWeighted))


def test_one_batch_an_update_is_nothing_to_certify():
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        certify(trainer_of("masked", 20, 1))
