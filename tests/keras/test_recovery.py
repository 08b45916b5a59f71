"""Out of memory in a batch of `fit`: the update is made all the same, as if it had not happened."""

import logging

import keras
import numpy as np
import pytest
from tests.keras.backends import BACKEND
from tests.keras.running_out import BATCH, Model, Points, X, Y, ambiguous, assert_same, model, state

import virtualbatch.keras as vb
from virtualbatch import Auto

pytestmark = pytest.mark.usefixtures("quick_plans")

# Points of a window: of each micro-batch on PyTorch, else one.
EACH = 2 if BACKEND == "torch" else 0


def fitted(size, points=None, epochs=2, **sizes):
    found = model(points)
    vb.accumulate(found, **(sizes or {"microbatch_size": size}))
    history = found.fit(X, Y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return found, history.history, state(found)


def windows(size, rows):
    return max(1, EACH * -(-rows // size))


@pytest.mark.parametrize(
    "size", [12, *(pytest.param(n, marks=pytest.mark.thorough("another size")) for n in (24, 7))]
)
def test_the_first_batch_runs_again(size, caplog):
    # A short batch runs out with its own rows; here the first one does.
    with caplog.at_level(logging.WARNING, "virtualbatch"):
        _, history, after = fitted(size, Points([0]))
    _, due, due_after = fitted(size // 2)
    assert history == due
    assert_same(after, due_after)
    assert f"micro-batches of {size // 2} rows, which are kept" in caplog.text


@pytest.mark.thorough("test_injection.py lets some of these points run out in the quick tier")
@pytest.mark.parametrize(
    ("size", "point"), [(size, i) for size in (24, 12, 8) for i in range(1, windows(size, BATCH))]
)
def test_any_point_of_the_first_batch(size, point):
    _, history, after = fitted(size, Points([point]))
    _, due, due_after = fitted(size // 2)
    assert history == due
    assert_same(after, due_after)


def test_it_may_run_out_again_and_again():
    _, history, after = fitted(24, Points([0, 1, 2]))
    _, due, due_after = fitted(3)
    assert history == due
    assert_same(after, due_after)


def test_a_later_batch_runs_again_with_all_that_came_before():
    # The first batches have 12 rows a micro-batch, from the last of the epoch on there are 6.
    last = 2 * windows(12, BATCH)
    found = model(Points([last]))
    vb.accumulate(found, microbatch_size=12)
    data = [(X[:24], Y[:24]), (X[24:48], Y[24:48]), (X[48:], Y[48:])]
    logs = [found.train_on_batch(*batch, return_dict=True) for batch in data]
    due = model()
    vb.accumulate(due, microbatch_size=12)
    due_logs = [due.train_on_batch(*batch, return_dict=True) for batch in data[:2]]
    vb.accumulate(due, microbatch_size=6)
    due_logs.append(due.train_on_batch(*data[2], return_dict=True))
    assert logs == due_logs
    assert_same(state(found), state(due))


def test_the_smaller_size_is_kept():
    found, _, _ = fitted(24, Points([0]), epochs=1)
    assert found.train_step.most == 12
    vb.accumulate(found, microbatch_size=24)
    assert found.train_step.most is None


def test_it_grows_again_when_asked():
    found = model(Points())
    vb.accumulate(found, microbatch_size=Auto(memory_limit="1GiB", grow_after=2))
    found.train_on_batch(X[:30], Y[:30])
    planned = found.train_step.most
    # Other rows, for which the same plan holds.
    found.points.fail = {found.points.count}
    found.train_on_batch(X[:24], Y[:24])
    shrunk = found.train_step.most
    # The plan depends on what is fast. A cut of 24 rows is even, or full but for the last.
    even = -(-24 // -(-24 // planned))
    assert shrunk in (even // 2, min(planned, 24) // 2)
    found.train_on_batch(X[:24], Y[:24])
    assert found.train_step.most == min(2 * shrunk, planned)


def test_a_number_of_micro_batches_is_recovered_too():
    _, history, after = fitted(None, Points([0]), accumulation_steps=2)
    _, due, due_after = fitted(6)
    assert history == due
    assert_same(after, due_after)


def test_nothing_is_left_to_halve():
    found = model(Points(range(1000)))
    vb.accumulate(found, microbatch_size=4)
    found(X[:1])
    found.optimizer.build(found.trainable_variables)
    before = [np.array(x) for x in found.get_weights()]
    with pytest.raises(
        MemoryError, match=r"one row must fit.* The largest parameters are .*kernel"
    ) as e:
        found.train_on_batch(X[:24], Y[:24])
    for text in (
        " more were asked for with ",
        " left. Nothing of this update",
        "checkpointing",
        "bfloat16",
        "rows shorter",
    ):
        assert text in str(e.value)
    assert_same(before, found.get_weights())
    assert int(found.optimizer.iterations) == 0


def test_an_ambiguous_error_is_tried_with_less():
    _, history, after = fitted(24, Points([0], ambiguous), epochs=1)
    _, due, due_after = fitted(12, epochs=1)
    assert history == due
    assert_same(after, due_after)


def test_an_ambiguous_error_that_less_does_not_mend_comes_out_as_it_was():
    found = model(Points(range(1000), ambiguous))
    vb.accumulate(found, microbatch_size=4)
    found(X[:1])
    found.optimizer.build(found.trainable_variables)
    before = [np.array(x) for x in found.get_weights()]
    with pytest.raises(type(ambiguous()), match=str(ambiguous())):
        found.train_on_batch(X[:24], Y[:24])
    assert_same(before, found.get_weights())
    # Memory was not the reason, so the size stays.
    found.points.fail = set()
    found.train_on_batch(X[:24], Y[:24])
    assert found.train_step.most is None


def test_other_errors_come_out_as_they_are(monkeypatch):
    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Points, "__call__", broken)
    found = model(Points())
    vb.accumulate(found, microbatch_size=12)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        found.train_on_batch(X[:24], Y[:24])


@pytest.mark.thorough("test_saving.py saves models that accumulate")
def test_a_saved_model_does_not_know_of_it(tmp_path):
    found, _, _ = fitted(24, Points([0]), epochs=1)
    found.save_weights(tmp_path / "model.weights.h5")
    fresh = Model(Points())
    fresh(X[:1])
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(fresh(X)), keras.ops.convert_to_numpy(found(X))
    )
