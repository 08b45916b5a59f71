"""How TensorFlow runs a window changes nothing, and is not slow."""

import keras
import pytest
import tensorflow as tf
from keras import layers
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.keras.training import Case, assert_same_run, train

LABELS = problems.LABELS


@pytest.mark.thorough("XLA compiles convolutions for seconds")
@pytest.mark.timeout(120)
def test_convolutions_do_not_hang_under_xla():
    # A convolution in a loop inside an XLA program takes seconds per micro-batch on CPU.
    def model():
        shape = problems.IMAGES.shape[1:]
        convolutions = [layers.Conv2D(8, 3, activation="relu") for _ in range(2)]
        return keras.Sequential(
            [keras.Input(shape), *convolutions, layers.Flatten(), layers.Dense(3)]
        )

    data = (problems.IMAGES, LABELS, {"batch_size": 130})
    actual = train(Case("", model, compiled(jit_compile=True), *data), accumulated=True)
    assert_same_run(actual, train(Case("", model, compiled(), *data), accumulated=False))


def test_functions_run_eagerly():
    case = Case("", problems.classifier, compiled(), X, LABELS)
    expected = train(case, accumulated=False)
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.warns(UserWarning, match="run_functions_eagerly"):
            actual = train(case, accumulated=True)
    finally:
        tf.config.run_functions_eagerly(False)
    assert_same_run(actual, expected)
