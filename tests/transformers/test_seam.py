"""What the adapter uses of Transformers: a release that changes it fails here, by name."""

import inspect

import pytest
from tests.transformers.training import trainer_of
from transformers import Trainer

METHODS = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "compute_loss_context_manager": ["self"],
    "_prepare_inputs": ["self", "inputs"],
    "get_train_dataloader": ["self"],
}
ATTRIBUTES = (
    "accelerator",
    "args",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "model",
)
ARGUMENTS = (
    "average_tokens_across_devices",
    "device",
    "gradient_accumulation_steps",
    "n_gpu",
    "optim",
    "world_size",
)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_these_parameters(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == METHODS[name]


def test_a_class_says_whether_its_loss_is_scaled():
    assert Trainer.loss_is_scaled_for_ga is None


def test_attributes_are_there():
    trainer = trainer_of("masked", 4, 5)
    assert [name for name in ATTRIBUTES if not hasattr(trainer, name)] == []
    assert [name for name in ARGUMENTS if not hasattr(trainer.args, name)] == []
    assert hasattr(trainer.accelerator, "scaler")
    assert hasattr(trainer.accelerator.gradient_state, "_set_sync_gradients")


def test_an_epoch_calls_them_as_the_adapter_expects():
    """Batches are read ahead for an update, whose last step is the one that synchronises."""
    trainer = trainer_of("masked", 4, 5, num_train_epochs=1)
    events = []
    read, step = trainer.get_batch_samples, trainer.training_step

    def get_batch_samples(*args):
        found = read(*args)
        events.append(("read", len(found[0])))
        return found

    def training_step(*args):
        events.append(("step", trainer.accelerator.gradient_state.sync_gradients))
        return step(*args)

    trainer.get_batch_samples, trainer.training_step = get_batch_samples, training_step
    trainer.train()
    whole = [("read", 5), *[("step", False)] * 4, ("step", True)]
    assert events == [*whole, *whole, ("read", 2), ("step", False), ("step", True)]
    assert trainer.current_gradient_accumulation_steps == 2
