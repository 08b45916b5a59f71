"""Bad input: a clear error, before anything is computed or changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.tensorflow.modes import compiled

import virtualbatch.tensorflow as vb

X = np.ones((6, 2))


class Call:
    """A call of the engine that records whether anything happened."""

    def __init__(self, **changes):
        self.variable = tf.Variable(np.float64(2))
        self.state = tf.Variable(0)
        self.calls = 0
        self.arguments = {
            "loss_fn": self.loss,
            "batch": X,
            "variables": [self.variable],
            "microbatch_size": 2,
        } | changes

    def loss(self, batch):
        self.calls += 1
        self.state.assign_add(1)
        return tf.reduce_mean(tf.nest.flatten(batch)[0]) * self.variable

    def run(self, mode):
        arguments = dict(self.arguments)
        batch = arguments.pop("batch")
        if mode == "closed over":
            # Whatever the batch is, the graph sees it as it is.
            return tf.function(lambda: vb.value_and_gradients(batch=batch, **arguments))()
        return vb.value_and_gradients(batch=batch, **arguments)

    def refused(self, mode, error, text):
        with pytest.raises(error, match=text):
            self.run(mode)
        assert (float(self.variable), int(self.state)) == (2.0, 0)


BOTH = ["eager", "closed over"]
WINDOW = vb.Window([X])

BEFORE_ANYTHING = {
    "zero": ({"microbatch_size": 0}, ValueError, r"Got microbatch_size=0\. Pass the number"),
    "negative": ({"microbatch_size": -4}, ValueError, r"Got microbatch_size=-4\."),
    "boolean": ({"microbatch_size": True}, ValueError, r"Got microbatch_size=True\."),
    "fraction": ({"microbatch_size": 2.0}, ValueError, r"Got microbatch_size=2\.0\."),
    "text": ({"microbatch_size": "big"}, ValueError, r"Got microbatch_size='big'\."),
    "tensor": ({"microbatch_size": tf.constant(2)}, ValueError, r"must be a positive integer"),
    "no variables": (
        {"variables": []},
        ValueError,
        r"at least one variable\. Got variables=\[\], as trainable_variables are before a model is "
        r"built\. Call model\.build",
    ),
    "zero steps": (
        {"microbatch_size": None, "accumulation_steps": 0},
        ValueError,
        r"accumulation_steps must be a positive integer\. Got accumulation_steps=0\.",
    ),
    "no size": ({"microbatch_size": None}, ValueError, r"Got neither microbatch_size nor"),
    "auto and counted": (
        {"microbatch_size": "auto", "accumulation_steps": 2},
        ValueError,
        r"Leave one of them out\.",
    ),
    "sizes disagree": (
        {"accumulation_steps": 2},
        ValueError,
        r"Got microbatch_size=2 and accumulation_steps=2 for 6 rows / 2 = 3 micro-batches\.",
    ),
    "rows differ": (
        {"batch": {"x": X, "y": [X[:5]]}},
        ValueError,
        r"Got 6 rows in batch\['x'\] and 5 rows in batch\['y'\]\[0\]\.",
    ),
    "no rows": ({"batch": (X[:0], X[:0])}, ValueError, r"Got 0 rows in batch\[0\]\."),
    "scalar leaf": ({"batch": [X, tf.constant(1.0)]}, ValueError, r"Got the scalar batch\[1\]\."),
    "no array": ({"batch": {"a": None, "b": 3}}, ValueError, r"at least one array\. Got none\."),
    "dataset": (
        {"batch": tf.data.Dataset.from_tensors(X)},
        ValueError,
        r"at least one array\. Got none\.",
    ),
    "sparse leaf": (
        {"batch": tf.sparse.from_dense(X)},
        TypeError,
        r"must be dense or ragged\. Got a SparseTensor\. Pass tf\.sparse\.to_dense",
    ),
    "empty window": (
        {"batch": vb.Window([]), "microbatch_size": None},
        ValueError,
        r"Got an empty Window\.",
    ),
    "window of nothing": (
        {"batch": vb.Window([X, None]), "microbatch_size": None},
        ValueError,
        r"at least one array\. Got none\.",
    ),
    "rows differ in a window": (
        {"batch": vb.Window([(X, X), (X, X[:1])]), "microbatch_size": None},
        ValueError,
        r"Got 6 rows in window\[1\]\[0\] and 1 rows in window\[1\]\[1\]\.",
    ),
    "window with a size": (
        {"batch": WINDOW},
        ValueError,
        r"already cut\. Got microbatch_size=2 and accumulation_steps=None with a Window\.",
    ),
    "window with steps": (
        {"batch": WINDOW, "microbatch_size": None, "accumulation_steps": 2},
        ValueError,
        r"Got microbatch_size=None and accumulation_steps=2 with a Window\. Leave both out\.",
    ),
    "loss is no function": (
        {"loss_fn": 3},
        TypeError,
        r"loss_fn must be a function of one batch\. Got loss_fn=3\. Pass loss_fn=lambda batch",
    ),
    "weight is no function": ({"weight": 4.0}, TypeError, r"weight must be .* Got weight=4\.0\."),
    "variables are a generator": (
        {"variables": iter([1])},
        TypeError,
        r"nested structure of variables\. Got one of type list_iterator\. Pass for example",
    ),
    "a variable is None": ({"variables": [None]}, TypeError, r"Got one of type NoneType\."),
}

WEIGHTS = {
    "negative": (lambda b: -1.0, r"Got weight=-1\.0 for micro-batch 0\. Return what"),
    "later negative": (lambda b: float(b[0, 0]), r"Got weight=-3\.0 for micro-batch 1\."),
    "NaN": (lambda b: float("nan"), r"Got weight=nan for micro-batch 0\."),
    "infinite": (lambda b: tf.constant(np.inf), r"Got weight=inf for micro-batch 0\."),
}

FORMS = {
    "vector": (lambda b: tf.ones([2]), r"Got shape \(2,\) for term 'loss'\. Reduce it"),
    "NumPy vector": (lambda b: np.ones(3), r"Got shape \(3,\) for term 'loss'\."),
    "list": (lambda b: [1, 2], r"Got \[1, 2\] for term 'loss'\."),
    "None": (lambda b: None, r"Got None for term 'loss'\."),
    "text": (lambda b: "4", r"Got '4' for term 'loss'\."),
    "vector of a term": (lambda b: {"a": tf.ones([2])}, r"Got shape \(2,\) for term 'a'\."),
}

LOSSES = {
    "one per row": (lambda v: v * np.ones(2), ValueError, r"with shape \(2,\)\. Reduce it"),
    "one in a list": (lambda v: [v], TypeError, r"Got loss_fn\(batch\) of type list"),
    "one row": (lambda v: v[None], ValueError, r"with shape \(1,\)\."),
    "number": (lambda v: 1.0, TypeError, r"of type float\. If it returns \(loss, aux\), pass"),
    "NumPy number": (lambda v: np.float64(1), TypeError, r"tensor of TensorFlow\. Got float64\."),
    "nothing": (lambda v: None, TypeError, r"of type NoneType"),
    "integer": (lambda v: tf.cast(v, tf.int32), TypeError, r"floating dtype\. Got int32\. Cast"),
    "boolean": (lambda v: v > 1, TypeError, r"floating dtype\. Got bool\."),
    "complex": (lambda v: tf.complex(v, v), TypeError, r"floating dtype\. Got complex128\."),
    "no terms": (lambda v: {}, ValueError, r"at least one term\. Got an empty dict\."),
    "term of rows": (lambda v: {"a": v, "b": v[None]}, ValueError, r"\['b'\] with shape \(1,\)"),
    "with aux": (lambda v: (v, 3), TypeError, r"of type tuple\. If it returns \(loss, aux\)"),
}


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("name", BEFORE_ANYTHING)
def test_refused_before_anything_is_called(name, mode):
    changes, error, text = BEFORE_ANYTHING[name]
    call = Call(**changes)
    call.refused(mode, error, text)
    assert call.calls == 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_host_are_read_before_the_first_forward(name):
    weight, text = WEIGHTS[name]
    call = Call(batch=np.array([[1.0]] * 2 + [[-3.0]] * 2), weight=weight)
    call.refused("eager", ValueError, text)
    assert call.calls == 0


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("name", FORMS)
def test_weights_that_are_no_numbers(name, mode):
    weight, text = FORMS[name]
    call = Call(weight=weight)
    call.refused(mode, ValueError, text)
    assert call.calls == 0


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_no_mean(name, mode):
    result, error, text = LOSSES[name]
    call = Call()
    call.arguments["loss_fn"] = lambda batch: result(call.variable * 1)
    call.refused(mode, error, text)


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize(
    ("result", "got"), [(lambda v: v, "Tensor"), (lambda v: (v, 1, 2), "tuple")]
)
def test_aux_without_a_pair(result, got, mode):
    call = Call(has_aux=True)
    call.arguments["loss_fn"] = lambda batch: result(call.variable * 1)
    call.refused(mode, TypeError, rf"must return \(loss, aux\)\. Got \w*{got}\. Return a pair")


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (lambda b: {"a": 1}, r"Got loss terms \['a', 'b'\] and weight terms \['a'\]\."),
        (lambda b: {"a": 1, "c": 1}, r"and weight terms \['a', 'c'\]\. Return one weight"),
        (lambda b: 1, r"and weight terms \['loss'\]\."),
        (lambda b: {}, r"and weight terms \[\]\."),
    ],
)
def test_weights_of_other_terms(weight, text, mode):
    call = Call(weight=weight)
    call.arguments["loss_fn"] = lambda batch: {"a": call.variable * 1, "b": call.variable * 2}
    call.refused(mode, ValueError, text)


@pytest.mark.parametrize("mode", BOTH)
def test_weights_of_terms_for_a_loss_without_terms(mode):
    call = Call(weight=lambda batch: {"a": 1})
    call.arguments["loss_fn"] = lambda batch: call.variable * 1
    call.refused(mode, ValueError, r"Got loss terms \['loss'\] and weight terms \['a'\]\.")


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("first", [None, 1.0])
def test_a_term_is_independent_of_the_rows_always_or_never(first, mode):
    def weight(batch):
        # The remainder of one row answers otherwise.
        return {"loss": first if batch.shape[0] == 2 else {None: 1.0}.get(first)}

    call = Call(batch=vb.Window([X[:2], X[:1]]), microbatch_size=None, weight=weight)
    call.arguments["loss_fn"] = lambda batch: {"loss": call.loss(batch)}
    call.refused(mode, ValueError, r"None for the same ones\. Got .* and later .*Return 0\.0")
    assert call.calls == 0


def test_an_error_of_the_weight_leaves_tensorflow_as_it_was():
    # tf.map_fn, for one, would leave a scope behind that MirroredStrategy stumbles over.
    def weight(batch):
        raise RuntimeError("mine")

    Call(weight=weight).refused("closed over", RuntimeError, "mine")
    assert tf.compat.v1.get_variable_scope().caching_device is None
    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        pass


RUN_TIME = {
    "rows differ": ((X, X[:4]), {}, r"same number of rows, at least one\. Got rows\] \[6 4\]"),
    "no rows": ((X[:0], X[:0]), {}, r"same number of rows, at least one\. Got rows\] \[0 0\]"),
    "sizes disagree": (
        (X, X),
        {"accumulation_steps": 2},
        r"Got microbatch_size=2 and accumulation_steps=2 for the batch rows.* \[6\]",
    ),
}


@pytest.mark.parametrize("name", RUN_TIME)
def test_a_graph_with_open_rows_refuses_before_state_changes(name):
    batch, changes, text = RUN_TIME[name]
    call = Call(**changes)
    arguments = {key: value for key, value in call.arguments.items() if key != "batch"}

    def train(batch):
        return vb.value_and_gradients(batch=batch, **arguments)

    with pytest.raises(tf.errors.InvalidArgumentError, match=text):
        compiled("dynamic", train, batch)(batch)
    assert int(call.state) == 0


def test_rows_that_only_one_leaf_leaves_open_are_compared_too():
    # The open leaf would otherwise be truncated to the rows of the other.
    call = Call()
    signature = [tf.TensorSpec([None, 2], tf.float64), tf.TensorSpec([4, 2], tf.float64)]

    @tf.function(input_signature=signature)
    def train(x, y):
        return vb.value_and_gradients(call.loss, (x, y), [call.variable], microbatch_size=2)

    train(X[:4], X[:4])
    assert int(call.state) == 2
    for rows in (6, 3):
        with pytest.raises(tf.errors.InvalidArgumentError, match="the same number of rows"):
            train(np.ones((rows, 2)), X[:4])
    assert int(call.state) == 2


@pytest.mark.parametrize("verb", [vb.value_and_gradients, vb.certify, vb.plan])
def test_variables_of_a_float8_layer_are_refused(verb):
    layer = keras.layers.Dense(1)
    layer.build((None, 2))
    layer.quantize("float8")
    sizes = {} if verb is vb.plan else {"microbatch_size": 2}
    with pytest.raises(ValueError, match=r"inputs_scale' of a float8 layer.*keras\.accumulate"):
        verb(lambda batch: tf.reduce_mean(layer(batch)), X, layer.trainable_variables, **sizes)


@pytest.mark.parametrize("verb", [vb.certify, vb.plan])
def test_certify_and_plan_refuse_no_variables(verb):
    sizes = {} if verb is vb.plan else {"microbatch_size": 2}
    with pytest.raises(ValueError, match="before a model is built"):
        verb(tf.reduce_mean, X, [], **sizes)


def test_an_error_of_the_loss_is_passed_on_and_nothing_changes():
    call = Call()

    def loss_fn(batch):
        call.calls += 1
        if call.calls == 2:
            raise RuntimeError("mine")
        return tf.reduce_mean(batch) * call.variable

    call.arguments["loss_fn"] = loss_fn
    call.refused("eager", RuntimeError, "mine")
    # The next window is as if nothing had happened.
    loss, (gradient,) = call.run("eager")
    assert (float(loss), float(gradient)) == (2.0, 1.0)
