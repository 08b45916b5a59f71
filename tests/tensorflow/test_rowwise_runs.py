"""How often a `rowwise` function runs, what it holds meanwhile, and what a size that fails does."""

import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.oracle import EXACT, assert_close
from tests.tensorflow.modes import compiled
from tests.tiers import tiered

import virtualbatch.tensorflow as vb

ROWS = 7
KERNEL = np.random.default_rng(0).normal(size=(4, 3))


def batch(rows=ROWS):
    return tf.constant(np.random.default_rng(1).normal(size=(rows, 4)))


def spread(z):
    return tf.reduce_sum(tf.math.reduce_std(z, 0))


class Counted:
    """tanh of rows times a kernel; counts its runs."""

    def __init__(self, **options):
        self.kernel = tf.Variable(KERNEL, **options)
        self.runs = 0

    def __call__(self, x):
        self.runs += 1
        return tf.tanh(x @ self.kernel)

    def gradient(self, encode, batch):
        with tf.GradientTape() as tape:
            loss = spread(encode(batch))
        return tape.gradient(loss, self.kernel)


def test_eagerly_each_micro_batch_runs_twice():
    fn = Counted()
    encode = vb.rowwise(fn, microbatch_size=2)
    due = fn.gradient(fn, batch())
    for expected in (9, 8):  # the first time it is traced as well
        fn.runs = 0
        assert_close(fn.gradient(encode, batch()), due, EXACT)
        assert fn.runs == expected


@pytest.mark.parametrize("mode", tiered(["static", "dynamic"], ["static"], "fewer shapes"))
def test_a_graph_traces_twice_per_shape(mode):
    fn = Counted()
    encode = vb.rowwise(fn, microbatch_size=3)
    call = compiled(mode, lambda x: fn.gradient(encode, x), batch())
    due = fn.gradient(fn, batch())
    fn.runs = 0
    for _ in range(2):
        assert_close(call(batch()), due, EXACT)
    # Three rows and one row; or as many as there are.
    assert fn.runs == {"static": 4, "dynamic": 2}[mode]


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_rows_take_no_gradient_that_nobody_asks_for(mode):
    """It would be as large as the batch."""
    kernel = tf.Variable(KERNEL)
    asked = []

    @tf.custom_gradient
    def noted(x):
        def backward(upstream):
            asked.append(None)
            return upstream

        return tf.identity(x), backward

    encode = vb.rowwise(lambda x, shared: noted(x + noted(shared)) @ kernel, microbatch_size=3)

    def call(x, shared):
        with tf.GradientTape() as tape:
            loss = spread(encode(x, shared))
        return tape.gradient(loss, kernel)

    (tf.function(call) if mode == "static" else call)(batch(), tf.ones([4], tf.float64))
    assert not asked


def test_frozen_variables_need_no_second_pass():
    fn = Counted(trainable=False)
    head = tf.Variable(KERNEL.T)
    encode = vb.rowwise(fn, microbatch_size=2)
    fn.runs = 0
    with tf.GradientTape() as tape:
        loss = spread(encode(batch()) @ head)
    found = tape.gradient(loss, head)
    assert fn.runs == 1 + 4
    with tf.GradientTape() as tape:
        loss = spread(fn(batch()) @ head)
    assert_close(found, tape.gradient(loss, head), EXACT)


def test_without_a_tape_and_with_a_large_size_it_is_the_function_itself():
    fn = Counted()
    assert_close(vb.rowwise(fn, microbatch_size=2)(batch()), fn(batch()), EXACT)
    assert fn.runs == 2
    fn.gradient(vb.rowwise(fn, microbatch_size=9), batch())
    assert fn.runs == 3


@pytest.mark.parametrize("outer", tiered(["eager", "static"], ["eager"], "as a batch in a graph"))
def test_a_window_is_taken_as_it_is_cut(outer):
    fn = Counted()
    seen = []

    def noted(x):
        seen.append(x.shape[0])
        return fn(x)

    encode = vb.rowwise(noted)

    def call(window):
        return fn.gradient(encode, window)

    window = vb.Window([batch()[:3], batch()[3:6], batch()[6:]])
    call = tf.function(call) if outer == "static" else call
    assert_close(call(window), fn.gradient(fn, batch()), EXACT)
    assert seen[-3:] == [3, 3, 1] if outer == "eager" else {*seen} == {3, 1}
    if outer == "eager":
        assert_close(encode(window), fn(batch()), EXACT)


def test_a_nested_tape_in_a_graph_with_layers_that_are_built_inside():
    model = keras.Sequential([keras.layers.Dense(3, dtype="float64")])
    encode = vb.rowwise(lambda x: model(x), microbatch_size=2)

    @tf.function
    def call(x):
        with tf.GradientTape() as tape:
            loss = spread(encode(x))
        return tape.gradient(loss, model.trainable_variables)

    found = call(batch())
    with tf.GradientTape() as tape:
        loss = spread(model(batch()))
    for a, b in zip(found, tape.gradient(loss, model.trainable_variables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * float(tf.reduce_max(abs(found[0]))))


def test_only_one_micro_batch_is_held():
    kernel = tf.Variable(KERNEL)
    alive = weakref.WeakSet()
    most = []

    class Held:
        pass

    @tf.custom_gradient
    def activation(x):
        held = Held()  # for as long as the backward pass of this micro-batch may come

        def backward(upstream):
            assert held in alive
            return upstream

        if tf.executing_eagerly():
            alive.add(held)
            most.append(len(alive))
        return tf.identity(x), backward

    encode = vb.rowwise(lambda x: activation(x @ kernel), microbatch_size=1)
    with tf.GradientTape() as tape:
        z = encode(batch(16))
        assert not alive
        loss = spread(z)
    tape.gradient(loss, kernel)
    assert len(most) == 32
    assert max(most) <= 2


def failing(at, rows, layer=None):
    """A function that runs out of memory above some rows: forwards or backwards."""
    kernel = tf.Variable(KERNEL)
    sizes = []

    def check(x, phase):
        if phase == at and tf.executing_eagerly() and x.shape[0] > rows:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    @tf.custom_gradient
    def passing(x):
        check(x, "forward")

        def backward(upstream):
            check(upstream, "backward")
            return upstream

        return tf.identity(x), backward

    def fn(x):
        if tf.executing_eagerly():
            sizes.append(x.shape[0])
        z = passing(x @ kernel)
        return z if layer is None else layer(z, training=True)

    return fn, kernel, sizes


def gradient(encode, kernel, rows=8):
    with tf.GradientTape() as tape:
        loss = spread(encode(batch(rows)))
    return tape.gradient(loss, kernel)


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_memory_that_runs_out_makes_micro_batches_smaller(at):
    fn, kernel, sizes = failing(at, 2)
    encode = vb.rowwise(fn, microbatch_size=8 - 1)
    found = gradient(encode, kernel)
    assert_close(found, gradient(lambda x: tf.identity(x @ kernel), kernel), EXACT)
    assert max(sizes[-4:]) == 2
    sizes.clear()
    gradient(encode, kernel)
    assert max(sizes) == 2  # the smaller size is kept


def test_random_numbers_start_again_when_the_first_pass_does():
    layer = keras.layers.Dropout(0.5, dtype="float64", seed=3)
    fn, kernel, _ = failing("forward", 2, layer)
    found = gradient(vb.rowwise(fn, microbatch_size=4), kernel)
    state = layer.seed_generator.state.numpy()
    again = keras.layers.Dropout(0.5, dtype="float64", seed=3)
    fn, kernel, _ = failing("never", 2, again)
    assert_close(found, gradient(vb.rowwise(fn, microbatch_size=2), kernel), EXACT)
    assert (state == again.seed_generator.state.numpy()).all()


def test_a_second_pass_that_depends_on_the_cut_names_a_size():
    fn, kernel, _ = failing("backward", 2, keras.layers.Dropout(0.5, dtype="float64"))
    with pytest.raises(MemoryError, match=r"micro-batches of 4 rows.*Pass microbatch_size=2"):
        gradient(vb.rowwise(fn, microbatch_size=4), kernel)


@pytest.mark.usefixtures("untimed_plans")
@pytest.mark.parametrize("outer", tiered(["eager", "static"], ["static"], "plans take seconds"))
def test_a_size_can_be_planned(outer):
    fn = Counted()
    encode = vb.rowwise(fn, microbatch_size="auto")
    call = compiled(outer, lambda x: fn.gradient(encode, x), batch())
    assert_close(call(batch()), fn.gradient(fn, batch()), EXACT)
    fn.runs = 0
    call(batch())
    assert fn.runs <= (2 * ROWS if outer == "eager" else 0)


def test_a_function_may_take_its_micro_batch_apart():
    variable = tf.Variable([[1.0], [2.0]])

    encode = vb.rowwise(lambda batch: batch.pop("x") @ variable, microbatch_size=2)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(encode({"x": tf.ones([4, 2])}) ** 2)
    np.testing.assert_allclose(tape.gradient(loss, variable), [[24.0], [24.0]])
