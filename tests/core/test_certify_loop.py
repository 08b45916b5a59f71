"""certify_loop on loops of NumPy: right ones are exact, every mistake is named."""

import copy
import dataclasses

import numpy as np
import pytest

from virtualbatch import certify_loop

RNG = np.random.default_rng(0)
FEATURES, OUTPUTS, ROWS = 5, 3, 12


def batch(rows=ROWS):
    mask = np.arange(4) < RNG.integers(1, 5, (rows, 1))
    return {
        "x": RNG.normal(size=(rows, FEATURES)),
        "y": RNG.normal(size=(rows, OUTPUTS)),
        "mask": mask.astype(float),
        "id": RNG.integers(0, 6, rows),
    }


BATCHES = [batch(), batch()]


class Training:
    """Two tied layers and an embedding, trained by a loop that makes the mistakes asked for."""

    def __init__(self, optimizer="sgd", tokens=False, clip=None, ema=False, schedule=False, **bad):
        rng = np.random.default_rng(1)
        self.weights = {
            "w": rng.normal(size=(FEATURES, OUTPUTS)),
            "embedding": rng.normal(size=(6, OUTPUTS)),
        }
        self.optimizer, self.tokens, self.clip = optimizer, tokens, clip
        self.average = {k: v.copy() for k, v in self.weights.items()} if ema else None
        self.rate = {"rate": 0.05, "count": 0} if schedule else None
        self.slots = {k: np.zeros_like(v) for k, v in self.weights.items()}
        self.moments = {k: np.zeros_like(v) for k, v in self.weights.items()}
        self.updates = 0
        self.bad = bad

    def count(self, piece):
        return piece["mask"].sum() if self.tokens else float(len(piece["x"]))

    def gradient(self, piece):
        """Of sum(weight per row * squared error) / count."""
        each = piece["mask"].sum(1) if self.tokens else np.ones(len(piece["x"]))
        error = piece["x"] @ self.weights["w"] + self.weights["embedding"][piece["id"]] - piece["y"]
        error = error * each[:, None] / self.count(piece)
        embedding = np.zeros_like(self.weights["embedding"])
        np.add.at(embedding, piece["id"], error)
        return {"w": piece["x"].T @ error, "embedding": embedding}

    def clipped(self, gradient):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        return {k: g * min(1.0, self.clip / norm) for k, g in gradient.items()}

    def update(self, gradient):
        rate = self.rate["rate"] if self.rate else 0.05
        self.updates += 1
        for name, g in gradient.items():
            if self.optimizer == "momentum":
                self.slots[name] = g = 0.9 * self.slots[name] + g
            if self.optimizer == "adam":
                self.slots[name] = 0.9 * self.slots[name] + 0.1 * g
                self.moments[name] = 0.99 * self.moments[name] + 0.01 * g**2
                g = self.slots[name] / (1 - 0.9**self.updates)
                g = g / (np.sqrt(self.moments[name] / (1 - 0.99**self.updates)) + 1e-3)
            self.weights[name] = self.weights[name] - rate * g

    def after_update(self):
        if self.average:
            for name, value in self.weights.items():
                self.average[name] = 0.9 * self.average[name] + 0.1 * value

    def step_schedule(self):
        if self.rate:
            self.rate["count"] += 1
            self.rate["rate"] *= 0.9

    def loop(self, microbatches, accumulation_steps):
        kept = None
        for start in range(0, len(microbatches), accumulation_steps):
            window = microbatches[start : start + accumulation_steps]
            if self.bad.get("drop_last") and len(window) < accumulation_steps:
                return
            total = sum(map(self.count, window))
            summed = {name: np.zeros_like(value) for name, value in self.weights.items()}
            if kept is not None:
                summed = kept
            for index, piece in enumerate(window):
                share = self.count(piece) / total
                if self.bad.get("mean_of_means"):
                    share = 1 / len(window)
                if self.bad.get("under_scaled"):
                    share *= len(window) / accumulation_steps
                share *= self.bad.get("scale", lambda k: 1.0)(accumulation_steps)
                gradient = self.gradient(piece)
                if self.bad.get("clip_each"):
                    gradient = self.clipped(gradient)
                if self.bad.get("lose") and index:
                    gradient[self.bad["lose"]] = 0 * gradient[self.bad["lose"]]
                if self.bad.get("ema_each"):
                    self.after_update()
                if self.bad.get("schedule_each") and index:
                    self.step_schedule()
                if self.bad.get("zeros") and index:
                    self.update({name: 0 * value for name, value in self.weights.items()})
                for name, g in gradient.items():
                    summed[name] = summed[name] + share * g
            if self.bad.get("stale"):
                kept = summed
            self.update(
                self.clipped(summed) if self.clip and not self.bad.get("clip_each") else summed
            )
            if not self.bad.get("ema_each") or len(window) == 1:
                self.after_update()
            self.step_schedule()

    def save(self):
        found = {"weights": self.weights, "slots": self.slots, "moments": self.moments}
        more = {"average": self.average, "rate": self.rate}
        return found | {name: value for name, value in more.items() if value}

    def load(self, state):
        self.weights, self.slots = state["weights"], state["slots"]
        self.moments, self.updates = state["moments"], 0
        self.average, self.rate = state.get("average"), state.get("rate")


def certified(size=3, batches=None, **options):
    training = Training(**options)
    return certify_loop(
        training.loop,
        batches or BATCHES,
        microbatch_size=size,
        save=training.save,
        load=training.load,
    )


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "momentum"},
        {"optimizer": "adam"},
        {"tokens": True},
        {"clip": 0.1},
        {"ema": True},
        {"schedule": True},
        {"optimizer": "adam", "tokens": True, "clip": 0.1, "ema": True, "schedule": True},
    ],
    ids=str,
)
def test_no_false_alarm(options, size):
    found = certified(size, **options)
    assert found.findings == (), found
    assert found.exact
    assert found.max_error <= found.tolerance


# options -> (kind, text of where, text of why)
WRONG = [
    ({"tokens": True, "mean_of_means": True}, "weight", "weights.w", "mean of means"),
    ({"drop_last": True}, "last_window", "weights.w", "dropped"),
    ({"under_scaled": True}, "last_window", "weights.w", "0.5 times"),
    ({"scale": lambda k: 1 / k}, "sum_loss", "weights.w", "0.25 times"),
    ({"scale": lambda k: k}, "sum_loss", "weights.w", "4 times"),
    ({"stale": True}, "stale_buffer", "weights.w", "second is not"),
    ({"clip": 0.1, "clip_each": True}, "clipping", "weights.w", "clipped"),
    ({"ema": True, "ema_each": True}, "per_microbatch", "average.w", "weights are right"),
    ({"schedule": True, "schedule_each": True}, "per_microbatch", "rate.count", "4 times"),
    ({"optimizer": "momentum", "zeros": True}, "per_microbatch", "slots.w", "zeros"),
    ({"lose": "w"}, "no_gradient", "weights.w", "lost"),
    ({"lose": "embedding"}, "no_gradient", "weights.embedding", "lost"),
]


@pytest.mark.parametrize(("options", "kind", "where", "why"), WRONG)
def test_every_mistake_is_named(options, kind, where, why):
    found = certified(**options)
    assert not found.exact
    (finding,) = found.findings
    assert finding.kind == kind, found
    assert where in finding.where
    assert why in finding.why
    if kind == "no_gradient":
        assert finding.where == where


def test_rows_that_do_not_divide_are_no_mean_of_means_of_ours():
    # A loop that divides by the number of micro-batches is wrong for a short last one.
    found = certified(5, mean_of_means=True)
    assert [finding.kind for finding in found.findings] == ["weight"]


def test_the_state_is_as_it_was():
    training = Training(optimizer="adam", ema=True)
    before = {name: value.copy() for name, value in training.weights.items()}
    certify_loop(training.loop, BATCHES, microbatch_size=3, save=training.save, load=training.load)
    assert all(np.array_equal(before[name], training.weights[name]) for name in before)


def refused(text, loop=None, batches=None, size=3, save=None):
    training = Training()
    with pytest.raises(ValueError, match=text):
        certify_loop(
            loop or training.loop,
            BATCHES if batches is None else batches,
            microbatch_size=size,
            save=save or training.save,
            load=training.load,
        )


def test_refusals():
    training = Training()
    refused("needs two whole batches", batches=BATCHES[:1])
    refused("equal rows. Got 12 and 6", batches=[BATCHES[0], batch(6)])
    refused("Got 12 rows and microbatch_size=7", size=7)
    refused("microbatch_size=0", size=0)
    refused("must change the state", loop=lambda pieces, k: None)
    refused("Got no array", save=lambda: {"weights": []})
    poisoned = [{**one, "x": one["x"] * np.nan} for one in BATCHES]
    refused("must be finite. Got NaN", batches=poisoned)
    rng = np.random.default_rng(0)

    def noisy(pieces, k):
        training.weights["w"] = training.weights["w"] + rng.normal()

    with pytest.raises(ValueError, match="must do the same each time"):
        certify_loop(noisy, BATCHES, microbatch_size=3, save=training.save, load=training.load)


@dataclasses.dataclass(frozen=True)
class Texts:
    x: np.ndarray
    texts: list


@dataclasses.dataclass
class State:
    weights: np.ndarray


def test_batches_and_states_may_be_dataclasses_and_texts_follow_their_rows():
    state = State(np.ones(2))

    def loop(pieces, accumulation_steps):
        for start in range(0, len(pieces), accumulation_steps):
            window = pieces[start : start + accumulation_steps]
            rows = sum(len(piece.x) for piece in window)
            for piece in window:
                lengths = np.array([len(text) for text in piece.texts])
                state.weights -= 0.1 * (piece.x * lengths[:, None]).sum(0) / rows

    def load(saved):
        state.weights[:] = saved.weights

    batches = [
        Texts(RNG.normal(size=(ROWS, 2)), ["x" * n for n in RNG.integers(1, 9, ROWS)])
        for _ in range(2)
    ]
    found = certify_loop(
        loop, batches, microbatch_size=4, save=lambda: copy.deepcopy(state), load=load
    )
    assert found.exact
    assert list(found.parameters) == ["weights"]
