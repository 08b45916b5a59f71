"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tests.jax.problems import MODES, in_mode
from tests.oracle import assert_close, tolerance

import virtualbatch.jax as vb


class OneHot:
    """A linear model in which sample i moves weight i alone."""

    def __init__(self, samples, optimizer=None, dtype="float64"):
        self.weights = jnp.zeros(samples, dtype)
        self.optimizer = optimizer or optax.sgd(1.0)
        self.state = self.optimizer.init(self.weights)

    def update(self, batch, loss=None, mode="eager", **options):
        """One update; what each weight moved by."""
        gradients = vb.value_and_grad(loss or (lambda w, rows: jnp.mean(rows @ w)), **options)
        found = in_mode(mode, gradients)(self.weights, batch)[1]
        changes, self.state = self.optimizer.update(found, self.state, self.weights)
        before, self.weights = self.weights, optax.apply_updates(self.weights, changes)
        return before - self.weights


def cut(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("mode", MODES)
def test_f1_every_token_counts_once(mode):
    # Two micro-batches of 2 x 4 tokens, 7 valid and 1 valid. Peers give the lone token 4 times.
    mask = np.ones((4, 4))
    mask[1, 3] = mask[2, :] = mask[3, 1:] = 0

    def loss(weights, batch):
        return ((batch["tokens"] @ weights) * batch["mask"]).sum() / batch["mask"].sum()

    moved = OneHot(16).update(
        {"tokens": np.eye(16).reshape(4, 4, 16), "mask": mask},
        loss,
        mode,
        microbatch_size=2,
        weight=lambda batch: batch["mask"].sum(),
    )
    assert_close(moved, mask.reshape(-1) * 0.125)


@pytest.mark.parametrize("mode", MODES)
def test_f2_a_short_last_batch_is_an_update_of_its_own(mode):
    # 10 samples by 4, two per window, two epochs: peers carry the short batch into the next epoch.
    model = OneHot(10)
    for _ in range(2):
        stream = vb.windows(cut(np.eye(10), 4), accumulation_steps=2)
        moved = [model.update(window, mode=mode) for window in stream]
        assert_close(moved[0], [1 / 8] * 8 + [0] * 2)
        assert_close(moved[1], [0] * 8 + [1 / 2] * 2)
        assert len(moved) == 2


@pytest.mark.parametrize("mode", MODES)
def test_f3_a_trailing_window_is_neither_dropped_nor_too_small(mode):
    # 5 micro-batches, 4 per window. Peers never apply the fifth, or a quarter of it.
    model = OneHot(10)
    stream = vb.windows(cut(np.eye(10), 2), accumulation_steps=4)
    moved = [model.update(window, mode=mode) for window in stream]
    assert len(moved) == 2
    assert_close(moved[1], [0] * 8 + [1 / 2] * 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_f4_a_term_that_is_already_a_mean_counts_once(steps, mode):
    # Squared error over 7 + 1 tokens, plus the mean of v squared: due is 1 for any cut.
    mask = np.array([1.0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]).reshape(4, 3)
    tokens = np.random.default_rng(0).normal(size=(4, 3, 8))

    def loss(params, batch):
        errors = (batch["tokens"] @ params["weights"] - 1) ** 2
        return {
            "tokens": (errors * batch["mask"]).sum() / batch["mask"].sum(),
            "extra": jnp.mean(params["extra"] ** 2),
        }

    ours = vb.value_and_grad(
        loss,
        accumulation_steps=steps,
        weight=lambda batch: {"tokens": batch["mask"].sum(), "extra": None},
    )
    params = {"weights": np.zeros(8), "extra": np.array([1.0, -1.0])}
    _, gradients = in_mode(mode, ours)(params, {"tokens": tokens, "mask": mask})
    assert_close(gradients["extra"], [1.0, -1.0])
    due = -2 * (tokens * mask[:, :, None]).sum((0, 1)) / mask.sum()
    assert_close(gradients["weights"], due)


@pytest.mark.parametrize("mode", MODES)
def test_f5_the_loss_is_not_times_the_micro_batches(mode):
    assert_close(OneHot(8).update(np.eye(8), mode=mode, accumulation_steps=4), [1 / 8] * 8)


def test_f6_a_schedule_counts_updates():
    # Rate 1 for two updates, then 0. Peers read the schedule at 3, 7, 11 and never move.
    model = OneHot(1, optax.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.0})))
    moved = [float(model.update(np.ones((4, 1)), accumulation_steps=4)[0]) for _ in range(4)]
    assert moved == [1.0, 1.0, 0.0, 0.0]


def test_f7_an_average_of_weights_takes_one_value_per_update():
    # Momentum 0.9: the weights are -1, -2, -3 after the updates. Peers average four times as often.
    model, average = OneHot(1), 0.0
    for _ in range(3):
        model.update(np.ones((4, 1)), accumulation_steps=4)
        average = optax.incremental_update(model.weights, average, 0.1)
    assert_close(average, [-0.561])
    # The same for an average of updates inside the optimizer.
    model = OneHot(1, optax.chain(optax.sgd(1.0), optax.ema(0.9, debias=False)))
    moved = [model.update(np.ones((4, 1)), accumulation_steps=4)[0] for _ in range(3)]
    assert_close(moved, [0.1, 0.19, 0.271])


@pytest.mark.parametrize("mode", MODES)
def test_f9_one_nan_spoils_its_own_window_only(mode):
    model = OneHot(1, optax.apply_if_finite(optax.sgd(1.0), 5))
    stream = [np.full((1, 1), value) for value in (1.0, np.nan, 1.0, 1.0, 1.0, 1.0)]
    moved = [
        float(model.update(window, mode=mode)[0])
        for window in vb.windows(stream, accumulation_steps=2)
    ]
    assert moved == [0.0, 1.0, 1.0]
    assert int(model.state.total_notfinite) == 1


def test_f10_a_stateful_optimizer_is_fed_once_per_window():
    batch = np.random.default_rng(0).normal(size=(8, 3))
    parts, whole = (OneHot(3, optax.adam(0.1)) for _ in range(2))
    for _ in range(3):
        parts.update(batch, accumulation_steps=4)
        whole.update(batch, microbatch_size=8)
    assert int(parts.state[0].count) == 3
    assert_close(parts.weights, whole.weights, 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("ids", "due"),
    [
        ([[[0]], [[0], [1]]], [2 / 3, 1 / 3]),
        ([[[0, 0]], [[0, 1]]], [0.75, 0.25]),
        ([[[0, 0]], [[1, 1]]], [0.5, 0.5]),
    ],
    ids=["again", "repeated", "apart"],
)
def test_f10_rows_of_an_embedding_are_neither_doubled_nor_lost(ids, due, mode):
    window = vb.Window(np.array(microbatch) for microbatch in ids)
    moved = OneHot(3).update(window, lambda table, ids: jnp.mean(table[ids]), mode)
    assert_close(moved, [*due, 0.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_f12_a_buffer_in_half_precision_does_not_stall(dtype):
    model = OneHot(1, dtype=dtype)
    moved = model.update(np.ones((4096, 1)).astype(dtype), mode="jit", microbatch_size=1)
    assert float(moved[0]) == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_r2_a_parameter_that_only_some_micro_batches_use(mode):
    def loss(params, rows):
        return jnp.mean(rows) * params["always"] + (
            params["first"] * jnp.mean(rows) if len(rows) == 1 else 0.0
        )

    params = {"always": np.float64(0), "first": np.float64(0)}
    window = vb.Window([np.ones(1), np.ones(3)])
    _, gradients = in_mode(mode, vb.value_and_grad(loss))(params, window)
    assert (float(gradients["always"]), float(gradients["first"])) == (1.0, 0.25)


@pytest.mark.parametrize("mode", MODES)
def test_r4_fewer_micro_batches_than_steps_are_no_smaller_update(mode):
    assert_close(OneHot(3).update(np.eye(3), mode=mode, accumulation_steps=4), [1 / 3] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_r4_each_micro_batch_has_its_own_dropout_mask(mode):
    def loss(weights, rows, key):
        kept = jax.random.bernoulli(key, 0.5, rows.shape)
        return jnp.mean(rows * kept @ weights), kept

    ours = vb.value_and_grad(loss, has_aux=True, microbatch_size=1, key_argnum=2)
    (_, masks), _ = in_mode(mode, ours)(np.ones(64), np.ones((4, 64)), jax.random.key(0))
    assert len(np.unique(np.asarray(masks), axis=0)) == 4


@pytest.mark.parametrize("mode", MODES)
def test_r7_the_variance_of_a_batchnorm_has_the_part_between_micro_batches(mode):
    # Two micro-batches with means far apart; peers keep the mean of their variances, which is 1.
    x = np.array([[0.0], [2.0], [10.0], [12.0]])

    def loss(scale, x):
        mean, variance = x.mean(0), x.var(0)
        normalised = (x - mean) / jnp.sqrt(variance)
        return jnp.mean((scale * normalised) ** 2), {"mean": mean, "square": variance + mean**2}

    ours = vb.value_and_grad(loss, has_aux=True, microbatch_size=2)
    (_, aux), _ = in_mode(mode, ours)(np.ones(1), x)
    assert_close(aux["square"] - aux["mean"] ** 2, x.var(0), tolerance("float64", 16))


@pytest.mark.parametrize("mode", MODES)
def test_r9_a_field_with_fewer_rows_is_not_truncated(mode):
    for rows in (8, 2):
        with pytest.raises(ValueError, match="the same number of rows"):
            OneHot(2).update((np.ones((4, 2)), np.ones(rows)), mode=mode, microbatch_size=2)


@pytest.mark.parametrize("mode", MODES)
def test_r10_unequal_totals_of_sample_weights(mode):
    def loss(weights, batch):
        return (batch["x"] @ weights * batch["w"]).sum() / batch["w"].sum()

    moved = OneHot(4).update(
        {"x": np.eye(4), "w": np.array([3.0, 3, 1, 1])},
        loss,
        mode,
        microbatch_size=2,
        weight=lambda batch: batch["w"].sum(),
    )
    assert_close(moved, [0.375, 0.375, 0.125, 0.125])


@pytest.mark.parametrize("mode", MODES)
def test_r10_two_outputs_with_two_masks(mode):
    masks = {"first": np.array([1.0, 0, 1, 1]), "second": np.array([1.0, 1, 1, 0])}

    def loss(params, batch):
        return {
            name: (batch["x"] @ params[name] * batch[name]).sum() / batch[name].sum()
            for name in masks
        }

    ours = vb.value_and_grad(
        loss,
        microbatch_size=2,
        weight=lambda batch: {name: batch[name].sum() for name in masks},
    )
    params = dict.fromkeys(masks, np.zeros(4))
    _, gradients = in_mode(mode, ours)(params, {"x": np.eye(4)} | masks)
    for name, mask in masks.items():
        assert_close(gradients[name], mask / 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_virtual_batch_that_the_micro_batch_does_not_divide(mode):
    # 130 rows by micro-batches of 32: peers give the last two 13 times as much.
    assert_close(OneHot(130).update(np.eye(130), mode=mode, microbatch_size=32), [1 / 130] * 130)
