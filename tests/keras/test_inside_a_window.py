"""What the micro-batches of a window are computed with, seen from inside the model.

Keras on JAX traces a model even where it runs eagerly, so nothing can be seen there.
"""

import keras
import numpy as np
from tests.keras.test_peers import fit, one_hot
from tests.oracle import assert_close

optimizers = keras.optimizers


def weights_seen(model):
    """The weight that every micro-batch was computed with; the model must run eagerly."""
    seen = []
    layer = model.layers[-1]
    call = layer.call

    def recording(inputs, **options):
        seen.append(layer.kernel.numpy().ravel().tolist())
        return call(inputs, **options)

    layer.call = recording
    return seen


def test_f7_weights_do_not_change_inside_a_window():
    # Every third update overwrites the weight by its average.
    optimizer = optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3)
    model = one_hot(1, optimizer, run_eagerly=True)
    seen = weights_seen(model)
    fit(model, np.ones((16, 1)), batch_size=4)
    # Some backends call a layer beforehand, to see the shape of what it gives.
    seen = seen[-16:]
    for window in range(4):
        assert_close(seen[4 * window : 4 * window + 4], [[-[0, 1, 2, 1.29][window]]] * 4)


def test_f10_a_stateful_optimizer_is_fed_no_zeros():
    model = one_hot(1, optimizers.Adam(0.1), run_eagerly=True)
    seen = weights_seen(model)
    fit(model, np.ones((12, 1)), batch_size=4)
    assert int(model.optimizer.iterations) == 3
    seen = seen[-12:]
    for window in range(3):
        assert len({tuple(weight) for weight in seen[4 * window : 4 * window + 4]}) == 1
    assert len({tuple(weight) for weight in seen}) == 3
