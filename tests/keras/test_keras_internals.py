"""The private parts of Keras that the engine stands on, so that an upgrade breaks here first."""

import inspect

import keras
import numpy as np
from keras.src import backend
from keras.src.losses import loss as loss_module
from keras.src.trainers.compile_utils import CompileLoss


def test_the_trainer_has_what_a_window_calls() -> None:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    for name in (
        "_aggregate_additional_loss",
        "_call_has_training_arg",
        "_compile_loss",
        "_compute_loss",
        "_flatten_layers",
        "_loss_tracker",
    ):
        assert hasattr(model, name), name
    assert isinstance(model._compile_loss, CompileLoss)
    entry = model._compile_loss._flat_losses[0]
    assert entry._fields == ("path", "loss", "loss_weights", "name")
    for name in ("_metrics", "_y_pred_build_structure", "_y_true_build_structure", "built"):
        assert name in vars(model._compile_loss), name


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
