"""All that a trainer does around its updates: as it is without us, but exact."""

import os

import pytest
import torch
from tests.tiers import tiered
from tests.transformers.training import (
    collated,
    error,
    model_of,
    rows_of,
    run,
    trained,
    trainer_of,
    weights_of,
)
from transformers import (
    Trainer,
    TrainerCallback,
)

from virtualbatch.transformers import accumulate, restore

OURS = {
    "window": (5, 4, {}),
    "cut": (20, 1, {"microbatch_size": 6}),
    "packed": (20, 1, {"microbatch_tokens": 60}),
}
ONE = {"num_train_epochs": 1}
ROWS = rows_of("tokens")


class Rows(Trainer):
    """Keeps the rows of each call of the loss in training."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.rows.append((self.state.global_step, len(inputs["input_ids"])))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def by_update(self):
        last = self.rows[-1][0]
        return [sum(n for step, n in self.rows if step == k) for k in range(last + 1)]


class Recorder(TrainerCallback):
    """Hears of everything.

    Attributes:
        events: their names, and the update that each came in.
    """

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def told(args, state, control, **kwargs):
            self.events.append((name, state.global_step))

        return told


def recorded(batch, steps, ours=None, head="llama", **more):
    """A training of two epochs of 46 rows, and what its callbacks heard."""
    recorder = Recorder()
    given = {"callbacks": [recorder], "eval_dataset": rows_of("tokens", 9, 5)}
    found = run(
        head,
        batch,
        steps,
        ours,
        given=given,
        eval_strategy="steps",
        eval_steps=2,
        include_num_input_tokens_seen="all",
        **more,
    )
    return found, recorder.events


@pytest.fixture(scope="module")
def whole():
    return recorded(20, 1)


@pytest.fixture(scope="module")
def in_batches():
    return recorded(5, 4)


TIMES = ("train_runtime", "samples_per_second", "steps_per_second", "eval_runtime", "tokens_per")


def assert_logs_alike(found, due):
    assert [sorted(log) for log in found] == [sorted(log) for log in due]
    for mine, its in zip(found, due, strict=True):
        for name, value in its.items():
            if not any(part in name for part in TIMES):
                assert mine[name] == pytest.approx(value, rel=1e-11, abs=1e-12), name


@pytest.mark.parametrize("name", OURS)
def test_two_epochs_are_told_as_the_trainer_tells_them(name, whole, in_batches):
    batch, steps, ours = OURS[name]
    found, events = recorded(batch, steps, ours, cls=Rows)
    alone, its_events = in_batches if steps > 1 else whole
    assert events == its_events
    assert ("on_substep_end" in dict(events)) == (steps > 1)
    assert found.trainer.by_update() == [20, 20, 6, 20, 20, 6]
    uncut = whole[0]
    assert error(found, uncut) < 1e-11
    state, due = found.trainer.state, alone.trainer.state
    assert state.global_step == due.global_step == 6
    assert state.epoch == due.epoch == 2
    assert [log["epoch"] for log in found.logs] == [log["epoch"] for log in alone.logs]
    assert (state.total_flos, state.num_input_tokens_seen) == (
        due.total_flos,
        due.num_input_tokens_seen,
    )
    # Of the trainer itself, which is exact here: losses, norms, learning rates, evaluations.
    assert_logs_alike(state.log_history, due.log_history)
    rates = [log["learning_rate"] for log in found.logs]
    assert rates == pytest.approx([0.01 * (1 - n / 6) for n in range(6)], rel=1e-12)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        super().__init__()
        self._rows = rows

    def __iter__(self):
        return iter(self._rows)


def streamed(ours=None, cls=Trainer):
    """Ten rows in batches of 2, four of them an update, over and over."""
    more = {"max_steps": 4, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    stream = Stream(rows_of("tokens", 10))
    return run("llama", 2, 4, ours, cls=cls, rows=stream, weight_decay=0.0, **more)


def by_hand():
    """Weights, losses and largest movement of updates of 8, 2, 8 and 2 rows."""
    model, rows = model_of("llama"), rows_of("tokens", 10)
    before, losses = weights_of(model), []
    for part in (rows[:8], rows[8:]) * 2:
        model.zero_grad()
        loss = model(**collated(part)).loss
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    after = weights_of(model)
    return after, losses, float((after - before).abs().max())


@pytest.mark.parametrize("ours", [{}, {"microbatch_tokens": 20}], ids=str)
def test_a_stream_without_a_length_ends_with_a_short_update(ours):
    weights, losses, moved = by_hand()
    found = streamed(ours, cls=Rows)
    assert found.trainer.by_update() == [8, 2, 8, 2]
    assert float((found.weights - weights).abs().max()) < 1e-11 * moved
    assert found.losses == pytest.approx(losses, abs=1e-12)
    assert found.trainer.state.epoch == 1.5
    assert found.trainer.state.global_step == 4


def test_the_trainer_alone_joins_the_end_of_a_stream_with_its_next_pass():
    weights, losses, moved = by_hand()
    found = streamed()
    assert float((found.weights - weights).abs().max()) > 0.4 * moved
    assert found.losses[1] == pytest.approx(losses[1] + losses[2], abs=0.05)


@pytest.mark.parametrize("name", tiered(["window", "cut"], ["window"], "another cut of the same"))
def test_a_checkpoint_is_the_trainers(name, tmp_path):
    batch, steps, ours = OURS[name]
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    whole = run("masked", batch, steps, ours, **saving)
    checkpoint = str(tmp_path / "checkpoint-2")
    assert "trainer_state.json" in os.listdir(checkpoint)

    def resumed(ours, batch=batch, steps=steps):
        trainer = trainer_of("masked", batch, steps)
        if ours is not None:
            accumulate(trainer, **ours)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 6
        return trainer

    again = resumed(ours)
    assert torch.equal(weights_of(again.model), whole.weights)
    found = weights_of(resumed({"microbatch_size": 3}).model)
    assert float((found - whole.weights).abs().max()) < 1e-11 * whole.moved
    # Without us it goes on as it does; with batches of an update's rows that is the same.
    alone = weights_of(resumed(None).model)
    is_same = float((alone - whole.weights).abs().max()) < 1e-11 * whole.moved
    assert is_same == (steps == 1)


def test_restore_leaves_nothing():
    trainer, fresh = (trainer_of("masked", 10, 2, **ONE) for _ in range(2))
    before = dict(vars(trainer))
    accumulate(trainer, microbatch_size=3)
    assert vars(trainer).keys() != before.keys()
    restore(trainer)
    assert vars(trainer).keys() == vars(fresh).keys()
    assert all(vars(trainer)[name] is value for name, value in before.items())
    found, due = trained(trainer), trained(fresh)
    assert torch.equal(found.weights, due.weights)
    assert found.losses == due.losses


def test_restore_after_training_leaves_a_trainer_of_its_own_kind():
    trainer, fresh = (trainer_of("masked", 10, 2, **ONE) for _ in range(2))
    accumulate(trainer).train()
    fresh.train()
    restore(trainer)
    assert vars(trainer).keys() == vars(fresh).keys()


def test_two_trainers_of_one_class_know_nothing_of_each_other():
    attributes = {cls: dict(vars(cls)) for cls in Rows.__mro__[:-1]}
    other, alone = (trainer_of("masked", 5, 4, cls=Rows, **ONE) for _ in range(2))
    mine = trainer_of("masked", 5, 4, cls=Rows, **ONE)
    accumulate(mine, microbatch_size=3)
    found = trained(mine)
    assert {cls: dict(vars(cls)) for cls in Rows.__mro__[:-1]} == attributes
    other, due = trained(other), trained(alone)
    assert torch.equal(other.weights, due.weights)
    assert error(found, other) > 0.1


@pytest.mark.parametrize("name", tiered(["window", "cut"], ["window"], "another cut of the same"))
def test_training_twice(name):
    batch, steps, ours = OURS[name]
    mine, alone = trainer_of("masked", batch, steps, **ONE), trainer_of("masked", 20, 1, **ONE)
    accumulate(mine, **ours).train()
    alone.train()
    found, due = trained(mine), trained(alone)
    assert error(found, due) < 1e-11


class Stops(TrainerCallback):
    """Stops in the middle of the second update, once."""

    is_done = False

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 1 and not self.is_done:
            self.is_done = control.should_training_stop = True


def test_a_training_that_stops_inside_an_update_can_begin_again():
    trainer = accumulate(
        trainer_of("masked", 5, 4, cls=Rows, given={"callbacks": [Stops()]}, **ONE)
    )
    one = trainer_of("masked", 20, 1, max_steps=1)
    first = trained(trainer)
    assert trainer.state.global_step == 1
    assert trainer.by_update() == [20]
    assert first.losses == pytest.approx(trained(one).losses, abs=1e-12)
    # What was collected of the second update is not in the next.
    trainer.rows.clear()
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.by_update() == [20, 20, 6]


def test_evaluation_and_prediction_are_the_trainers():
    rows = rows_of("tokens", 9, 4)
    mine = trainer_of("masked", 20, 1, given={"eval_dataset": rows}, **ONE)
    alone = trainer_of("masked", 20, 1, given={"eval_dataset": rows}, **ONE)
    accumulate(mine, microbatch_size=6)
    assert mine.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]
    first, second = mine.predict(rows), alone.predict(rows)
    assert (first.predictions == second.predictions).all()
    found, due = trained(mine), trained(alone)
    assert error(found, due) < 1e-11
    after = mine.evaluate()["eval_loss"]
    assert after == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-12)
    off = mine.predict(rows).predictions - alone.predict(rows).predictions
    assert abs(off).max() < 1e-10
