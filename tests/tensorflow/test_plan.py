"""Planning: peaks near those of real windows, nothing changed, automatic sizes."""

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.tensorflow.modes import compiled

import virtualbatch.tensorflow as vb
from virtualbatch import Auto
from virtualbatch.plan.host_memory import HostMemory
from virtualbatch.plan.search import Search
from virtualbatch.tensorflow._plan import plan as _plan
from virtualbatch.tensorflow._plan.peak import PeakMemory

pytestmark = pytest.mark.usefixtures("untimed_plans")

ROWS = 256


def program(rows=ROWS, length=1024):
    """A loss with an activation of 2 MiB per row, which BatchNorm and dropout change state for."""
    keras.utils.set_random_seed(0)
    norm, dropout = keras.layers.BatchNormalization(), keras.layers.Dropout(0.3)
    first, last = keras.layers.Dense(256, activation="tanh"), keras.layers.Dense(1)
    x = tf.random.normal([rows, length, 8], seed=1)
    for layer, width in ((first, 8), (norm, 256), (last, 256)):
        layer.build([None, length, width])

    def loss_fn(x):
        return tf.reduce_mean(last(dropout(norm(first(x), training=True), training=True)) ** 2)

    layers = (norm, dropout, first, last)
    variables = [v for layer in layers for v in layer.trainable_variables]
    return loss_fn, x, [v.value for v in variables], layers


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made, by a search that asks for little."""
    made = []
    plan = Search.plan

    def counted(self):
        made.append(plan(self))
        return made[-1]

    monkeypatch.setattr(Search, "plan", counted)
    return made


def small(rows=24):
    rng = np.random.default_rng(0)
    variable = tf.Variable(rng.normal(size=(6, 3)))
    x = tf.constant(rng.normal(size=(rows, 6)))
    return lambda x: tf.reduce_mean(tf.tanh(x @ variable) ** 2), x, [variable]


def measured_peaks():
    """{size: bytes} of the sizes that a plan measures."""
    loss_fn, x, variables, _ = program(64)
    found = vb.plan(loss_fn, x, variables)
    return {row.microbatch_size: row.peak_bytes for row in found.rows if row.measured}


@pytest.mark.thorough("half a minute of measured peaks")
def test_a_line_predicts_peaks_within_fifteen_percent():
    # With threads, what a graph holds at once depends on their order, so on the machine's load.
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json\nfrom tests.tensorflow.test_plan import measured_peaks\n"
            "print(json.dumps(list(measured_peaks().items())))",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr
    rows = dict(json.loads(child.stdout.splitlines()[-1]))
    assert set(rows) >= {8, 32, 64}
    slope = (rows[32] - rows[8]) / 24
    # Each of tanh, BatchNorm, dropout and the loss keeps or needs some MiB per row.
    assert slope > 3 * 2**20
    assert abs((rows[32] + 32 * slope) / rows[64] - 1) < 0.15


@pytest.mark.thorough("half a minute of measured peaks; Keras keeps a limit in the quick tier")
def test_a_limit_is_kept():
    loss_fn, x, variables, _ = program(64)
    rows = vb.plan(loss_fn, x, variables).rows
    limit = (rows[0].peak_bytes + rows[-1].peak_bytes) // 2
    found = vb.plan(loss_fn, x, variables, memory_limit=limit)
    assert found.microbatch_size < 64
    window = tf.function(
        lambda x: vb.value_and_gradients(
            loss_fn, x, variables, microbatch_size=found.microbatch_size
        )
    )
    held = sum(v.shape.num_elements() * 4 for v in variables) + x.shape.num_elements() * 4
    window(x)
    assert held + PeakMemory().of(lambda: window(x)[0].numpy()) < 1.15 * limit


def test_planning_changes_nothing(quick_plans):
    loss_fn, x, variables, layers = program(16, 64)
    state = [v.numpy() for layer in layers for v in layer.variables]
    vb.plan(loss_fn, x, variables)
    after = [v.numpy() for layer in layers for v in layer.variables]
    for a, b in zip(state, after, strict=True):
        np.testing.assert_array_equal(a, b)
    # Which is not because a window would change nothing.
    vb.value_and_gradients(loss_fn, x, variables, microbatch_size=8)
    changed = [v.numpy() for layer in layers for v in layer.variables]
    assert sum((a != b).any() for a, b in zip(state, changed, strict=True)) == 3


def graphs():
    return sum(isinstance(found, tf.Graph) for found in gc.get_objects())


def test_planning_leaves_no_graph_behind():
    arguments = small()
    gc.collect()
    before = graphs()
    vb.plan(*arguments)
    assert graphs() == before
    kept = compiled(
        "static", lambda x: vb.value_and_gradients(*arguments, microbatch_size=8), arguments[1]
    )
    kept(arguments[1])
    assert graphs() > before


def test_an_impossible_limit_is_refused():
    with pytest.raises(ValueError, match=r"must hold a micro-batch of one row"):
        vb.plan(*small(), memory_limit="10B")


def test_ragged_rows_are_planned():
    loss_fn, x, variables = small(rows=4)
    ragged = tf.RaggedTensor.from_tensor(x)
    found = vb.plan(lambda batch: loss_fn(batch.to_tensor(shape=[None, 6])), ragged, variables)
    assert 1 <= found.microbatch_size <= 4


def test_an_aux_that_no_graph_returns_is_refused():
    loss_fn, x, variables = small(rows=4)
    with pytest.raises(TypeError, match=r"number or None\. Got generator"):
        vb.plan(lambda batch: (loss_fn(batch), (k for k in ())), x, variables, has_aux=True)


def test_a_graph_and_a_window_are_refused():
    loss_fn, x, variables = small()
    with pytest.raises(ValueError, match=r"Got a call inside tf\.function\. Call it before"):
        tf.function(lambda: vb.plan(loss_fn, x, variables))()
    with pytest.raises(ValueError, match="A Window is already cut"):
        vb.plan(loss_fn, vb.Window([x]), variables)


@pytest.mark.parametrize("mode", ["eager", "static", "jit"])
def test_a_planned_call_is_that_of_the_same_size(mode, plans, caplog, quick_plans):
    loss_fn, x, variables = small()

    def run(size):
        call = compiled(
            mode,
            lambda x: vb.value_and_gradients(loss_fn, x, variables, microbatch_size=size),
            x,
        )
        loss, gradients = call(x)
        return loss.numpy(), gradients[0].numpy()

    with caplog.at_level(logging.INFO, "virtualbatch"):
        found = run("auto")
    (plan,) = plans
    assert f"microbatch_size={plan.microbatch_size} for batches of up to 24 rows" in caplog.text
    for a, b in zip(found, run(plan.microbatch_size), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_signature_is_planned_once(plans):
    loss_fn, x, variables = small()
    for rows in (20, 20, 3, 24, 20):
        vb.value_and_gradients(loss_fn, x[:rows], variables, microbatch_size="auto")
    assert len(plans) == 2
    size = Auto(memory_limit="1GiB")
    vb.value_and_gradients(loss_fn, x, variables, microbatch_size=size)
    assert plans[2].memory_limit == 2**30


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_another_loss_of_the_same_variables_and_shapes_is_planned_anew(mode, plans):
    _, x, (variable,) = small()
    for reduce in (tf.reduce_mean, tf.reduce_max):
        for _ in range(2):
            # Made anew at each call, as loops do.
            run = compiled(
                mode,
                lambda x, reduce=reduce: vb.value_and_gradients(
                    lambda x: reduce(x @ variable), x, [variable], microbatch_size="auto"
                ),
                x,
            )
            run(x)
    assert len(plans) == 2


def test_a_plan_of_a_file_is_not_used_under_another_limit(plans, tmp_path):
    loss_fn, x, variables = small()
    for limit in ("2GiB", "1GiB"):
        size = Auto(file=tmp_path / "plans.json", memory_limit=limit)
        vb.value_and_gradients(loss_fn, x, variables, microbatch_size=size)
    assert [plan.memory_limit for plan in plans] == [2**31, 2**30]


def test_sizes_are_forgotten_with_the_variables():
    from virtualbatch.tensorflow._remembered import _REMEMBERED

    loss_fn, x, variables = small()
    vb.value_and_gradients(loss_fn, x, variables, microbatch_size=8)
    key = id(variables[0])
    assert key in _REMEMBERED
    del loss_fn, variables
    assert key not in _REMEMBERED


def test_open_shapes_are_refused_in_a_graph():
    loss_fn, x, variables = small()
    run = compiled(
        "dynamic",
        lambda x: vb.value_and_gradients(loss_fn, x, variables, microbatch_size="auto"),
        x,
    )
    with pytest.raises(ValueError, match=r"Got shape \(None, 6\) in batch\. Call plan on a batch"):
        run(x)
    ragged = tf.RaggedTensor.from_row_lengths(tf.ones([6, 2]), [1, 2, 3])
    with pytest.raises(ValueError, match=r"Got a ragged array in batch\. Call plan"):
        tf.function(
            lambda x: vb.value_and_gradients(
                lambda x: tf.reduce_mean(x.flat_values) * variables[0][0, 0],
                x,
                variables,
                microbatch_size="auto",
            )
        )(ragged)


def no_room(monkeypatch):
    little = HostMemory(total_bytes=2**30, available_bytes=12 * 2**20, limits=())
    monkeypatch.setattr(_plan, "host_memory", lambda: little)


def no_graph(monkeypatch):
    def run(self):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(_plan._Program, "__call__", run)


def test_sizes_are_tried_eagerly_where_there_is_no_room_for_a_graph(
    monkeypatch, caplog, quick_plans
):
    no_room(monkeypatch)
    count = tf.Variable(0)
    kernel = tf.Variable(tf.ones([8, 4]))

    def loss_fn(x):
        count.assign_add(1)
        if tf.executing_eagerly() and len(x) > 4:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return tf.reduce_mean(x @ kernel)

    with caplog.at_level(logging.INFO, "virtualbatch"):
        found = vb.plan(loss_fn, tf.ones([24, 8]), [kernel])
    assert [row.microbatch_size for row in found.rows] == [1, 2, 4]
    assert found.microbatch_size <= 4
    (line,) = caplog.messages
    assert "sizes are tried from the smallest" in line
    assert int(count) == 0


@pytest.mark.thorough("another process under a limit")
def test_sizes_are_tried_in_a_process_of_little_address_space():
    script = Path(__file__).with_name("tight.py")
    # Else the C library keeps what is freed, and what fits is a matter of luck.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    tried = [row["microbatch_size"] for row in found["plan"]["rows"]]
    assert tried[:2] == [1, 2]
    assert tried[-1] < 256
    assert found["plan"]["microbatch_size"] in tried
    (line,) = found["log"]
    assert "sizes are tried from the smallest" in line
    assert found["intact"]


def test_a_first_window_that_runs_out_is_no_raw_error(monkeypatch):
    no_graph(monkeypatch)
    with pytest.raises(ValueError, match="one row ran out of memory"):
        vb.plan(*small())
