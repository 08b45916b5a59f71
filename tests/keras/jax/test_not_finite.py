"""Losses of a device that is never seen to be done are read at the end of an epoch."""

import keras
import numpy as np

import virtualbatch.keras as vb
from virtualbatch.keras._jax import step
from virtualbatch.keras._not_finite import LossesOfFit


def test_the_last_window_is_heard_of_although_its_device_is_not_done(caplog, monkeypatch):
    monkeypatch.setattr(step, "LossesOfFit", lambda is_there: LossesOfFit(lambda *_: False))
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    vb.accumulate(model, microbatch_size=4)
    x = np.ones((16, 3))
    x[15] = np.nan
    model.fit(x, np.ones((16, 1)), batch_size=8, shuffle=False, verbose=0)
    (message,) = [each for each in caplog.messages if "not_finite.md" in each]
    assert message.startswith("The loss is nan in micro-batch 2 of 2 of window 2 ")
