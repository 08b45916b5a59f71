"""The private parts of Keras that the engine stands on, so that an upgrade breaks here first."""

import importlib
import inspect

import keras
import numpy as np
import pytest
from keras.src import backend
from keras.src.losses import loss as loss_module
from keras.src.trainers.compile_utils import CompileLoss
from tests.private_names import private_imports, private_names

# Private names in src, by what has them. Whoever uses another one names it here.
NAMES = {
    "model": {
        "_aggregate_additional_loss",
        "_call_has_training_arg",
        "_clear_losses",
        "_compile_loss",
        "_compile_metrics",
        "_compute_loss",
        "_flatten_layers",
        "_loss_tracker",
        "_losses",
        "_losses_override",
        "_non_trainable_variables",
        "_operations",
        "_symbolic_build",
    },
    "layer": {"_dtype_policy", "_moments", "_seed_generators"},
    "variable": {"_dtype", "_initialize", "_value"},
    "loss": {"_fn_kwargs"},
    "compile_metrics": {"_flat_metrics", "_flat_weighted_metrics", "_flatten_y"},
    "compile_loss": {
        "_flat_losses",
        "_metrics",
        "_y_pred_build_structure",
        "_y_true_build_structure",
    },
}
# What only the trainer of JAX has; the second is set by each of its functions.
OF_JAX = {"_get_jax_state", "_jax_state"}
# What only TensorFlow has: of a strategy, of its data, and of the optimizer and model on it.
OF_TENSORFLOW = {
    "_all_reduce_sum_gradients",
    "_component_specs",
    "_distribute_strategy",
    "_first_batches",
    "_get_default_replica_mode",
    "_maybe_symbolic_build",
    "_pop_per_thread_mode",
    "_push_per_thread_mode",
}
IMPORTS = {
    "keras.src.backend",
    "keras.src.backend.common.global_state",
    "keras.src.losses.loss.apply_mask",
    "keras.src.random.seed_generator.GLOBAL_SEED_GENERATOR",
}


def test_every_private_name_in_use_is_named_here() -> None:
    assert private_names("keras") == set().union(*NAMES.values(), OF_JAX, OF_TENSORFLOW)
    assert private_imports("keras", r"keras\.src") == IMPORTS


@pytest.mark.parametrize("name", IMPORTS)
def test_what_is_imported_is_there(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_keras_has_every_private_name() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    owners = {
        "model": model,
        "layer": model.layers[0],
        "variable": model.trainable_variables[0],
        "loss": keras.losses.MeanSquaredError(),
        "compile_metrics": model._compile_metrics,
        "compile_loss": model._compile_loss,
    }
    assert isinstance(model._compile_loss, CompileLoss)
    for owner, names in NAMES.items():
        # A functional model has its operations in the functions that it is made of.
        lacking = {name for name in names if not hasattr(owners[owner], name)}
        assert lacking <= ({"_operations"} if owner == "model" else set())
    functional = keras.Model(model.inputs, model.outputs)
    assert functional._operations
    if keras.backend.backend() == "jax":
        assert callable(model._get_jax_state)
        assert "self._jax_state = " in inspect.getsource(type(model).fit)
    entry = model._compile_loss._flat_losses[0]
    assert entry._fields == ("path", "loss", "loss_weights", "name")
    assert "built" in vars(model._compile_loss)


def test_a_loss_reduces_in_its_call_as_the_terms_assume() -> None:
    assert list(inspect.signature(loss_module.apply_mask).parameters) == [
        "sample_weight",
        "mask",
        "dtype",
        "reduction",
    ]
    allowed = {"sum_over_batch_size", "sum", None, "none", "mean", "mean_with_sample_weight"}
    for reduction in allowed:
        loss_module.standardize_reduction(reduction)
    assert callable(backend.get_keras_mask)


def test_batch_normalization_asks_a_method_for_its_moments() -> None:
    layer = keras.layers.BatchNormalization()
    assert list(inspect.signature(layer._moments).parameters) == ["inputs", "mask"]
    assert layer.renorm is False
