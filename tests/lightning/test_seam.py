"""The names of Lightning that the adapter stands on: a release that moves one is seen here."""

import inspect

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from tests.lightning.nets import Net, Run
from tests.private_names import private_names

import virtualbatch.lightning as vb


def _names(function):
    return list(inspect.signature(function).parameters)


def test_private_names_of_lightning():
    """Each is looked at below, and there is no other."""
    of_engine = {"_replace", "_version"}
    own = {"_collected", "_heard", "_last", "_ran_at"}
    assert private_names("lightning") - of_engine - own == {"_should_accumulate", "_trainer"}


def test_where_a_trainer_says_that_an_update_is_complete():
    trainer = Run(max_epochs=1).trainer

    loop = trainer.fit_loop.epoch_loop
    for owner in (trainer.fit_loop, loop):
        assert callable(owner._should_accumulate)
        assert _names(owner._should_accumulate) == []
    assert (loop.batch_idx, loop.total_batch_idx, trainer.current_epoch) == (2, 2, 1)
    assert trainer.accumulate_grad_batches == 1
    assert trainer.training is False
    assert isinstance(trainer.callbacks, list)
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert trainer.strategy.model is trainer.lightning_module


def test_a_loss_is_divided_once_and_gradients_are_cleared_behind_the_step():
    source = inspect.getsource(_AutomaticOptimization._training_step)
    assert (
        "from_training_step_output(training_step_output, trainer.accumulate_grad_batches)" in source
    )
    closure = inspect.getsource(Closure.closure)
    order = [
        closure.index(f"self.{name}(") for name in ("_step_fn", "_zero_grad_fn", "_backward_fn")
    ]
    assert order == sorted(order)
    zero = inspect.getsource(_AutomaticOptimization._make_zero_grad_fn)
    assert "batch_idx % self.trainer.accumulate_grad_batches == 0" in zero


def test_the_step_is_looked_up_on_the_module_at_each_batch():
    source = inspect.getsource(Strategy.training_step)
    assert "self.lightning_module.training_step(*args, **kwargs)" in source
    assert 'self._forward_redirection(self.model, self.lightning_module, "training_step"' in source


def test_arguments_of_log():
    names = _names(LightningModule.log)
    assert names[:3] == ["self", "name", "value"]
    assert {"reduce_fx", "enable_graph", "batch_size"} < set(names)
    assert "self.log(" in inspect.getsource(LightningModule.log_dict)


def test_a_module_knows_its_trainer_and_fabric():
    module = LightningModule()
    assert module._trainer is None
    assert module.fabric is None
    assert module.automatic_optimization is True


def test_the_scaler_of_a_precision_plugin():
    scaler = torch.amp.GradScaler("cpu")
    assert MixedPrecision("16-mixed", "cpu", scaler).scaler is scaler
    assert isinstance(inspect.getattr_static(Trainer, "precision_plugin"), property)


def test_ddp_accumulates_no_more_than_others():
    assert "handles_gradient_accumulation" not in vars(DDPStrategy)
    assert "_forward_redirection" in inspect.getsource(Strategy)


@pytest.mark.parametrize("overridden", [True, False])
def test_lightning_sees_the_module_s_own_step_behind_ours(overridden):
    """It asks for code and signature, and warns or raises where there is none."""
    module = Net() if overridden else LightningModule()
    before = is_overridden("training_step", module)

    vb.accumulate(module, microbatch_size=3)

    assert is_overridden("training_step", module) is before is overridden
    has_index = is_param_in_hook_signature(module.training_step, "batch_idx", explicit=True)
    assert has_index is overridden


def test_the_release_is_one_that_is_served():
    major, minor = map(int, lightning.__version__.split(".")[:2])
    assert (2, 6) <= (major, minor) < (3, 0)
