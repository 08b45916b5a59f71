"""What Keras exports for TensorFlow's own tools."""

import tensorflow as tf
from tests.keras import problems
from tests.keras.problems import X, compiled
from tests.oracle import assert_close

import virtualbatch.keras as vb


def test_an_accumulating_model_is_exported(tmp_path):
    model = problems.classifier()
    model.compile(**compiled()())
    vb.accumulate(model, microbatch_size=16)
    model.fit(X, problems.LABELS, batch_size=50, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    assert_close(exported.serve(X), model.predict(X, verbose=0))
