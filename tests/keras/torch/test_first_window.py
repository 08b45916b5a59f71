"""The first window of modules of PyTorch, and of losses that draw by PyTorch."""

import keras
import numpy as np
import pytest
import torch
from keras import layers

import virtualbatch.keras as vb

pytestmark = pytest.mark.proves_itself

X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")


@pytest.fixture(autouse=True)
def _float32(_float64):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def trained(model, loss, check):
    keras.utils.set_random_seed(1)
    model = model()
    model.compile("sgd", loss)
    vb.accumulate(model, microbatch_size=4, check=check)
    model.train_on_batch(X, X[:, :2])
    model.train_on_batch(X, X[:, :2])
    return [np.array(variable) for variable in model.get_weights()], torch.rand(3).tolist()


def test_a_module_is_tried_without_its_batchnorm_and_dropout(caplog):
    def model():
        module = torch.nn.Sequential(
            torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.3)
        )
        return keras.Sequential([layers.TorchModuleWrapper(module), layers.Dense(2)])

    proven, plain = trained(model, "mse", True), trained(model, "mse", False)
    assert not [line for line in caplog.messages if "tried" in line]
    for value, same in zip(proven[0], plain[0], strict=True):
        np.testing.assert_array_equal(value, same)
    assert proven[1] == plain[1]


def test_a_loss_that_draws_random_numbers_cannot_be_tried(caplog):
    def noisy(y_true, y_pred):
        return torch.mean((y_true - y_pred + torch.randn_like(y_pred)) ** 2)

    def model():
        return keras.Sequential([layers.Dense(2)])

    proven = trained(model, noisy, True)
    (line,) = [line for line in caplog.messages if "tried" in line]
    assert "the same rows give a different result each time" in line
    plain = trained(model, noisy, False)
    np.testing.assert_array_equal(proven[0][0], plain[0][0])
    assert proven[1] == plain[1]


class PairsCentred(layers.Layer):
    def call(self, x):
        # A last odd row has no partner.
        paired = len(x) // 2 * 2
        pairs = x[:paired].reshape(-1, 2, x.shape[-1])
        return torch.cat([(pairs - pairs.mean(1, keepdim=True)).flatten(0, 1), x[paired:]])


def test_rows_that_belong_together_are_kept_together(caplog):
    model = keras.Sequential([layers.Dense(4), PairsCentred(), layers.Dense(2)])
    model.compile("sgd", "mse")
    vb.accumulate(model, microbatch_size=4)
    model.train_on_batch(X, X[:, :2])
    (line,) = [line for line in caplog.messages if "together" in line]
    assert "belong together by 2" in line
    # Ten rows are cut into 4 3 3.
    with pytest.raises(ValueError, match="must have a multiple of 2"):
        model.train_on_batch(X[:10], X[:10, :2])
