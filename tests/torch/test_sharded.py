"""The law with fully sharded modules: any rows on any rank, in step, and as of one uncut batch."""

import logging

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases, run
from tests.torch.replicated import ROWS, VERBS, rows, uncut, weight, with_batchnorm
from tests.torch.sharded import full_gradients, mse_of, net, sharded, steps, terms_of
from torch.distributed.fsdp import fully_shard

import virtualbatch.torch as vb
from virtualbatch.window.window import Window

TWO = Cases(2, limit=60)
CUTS = {
    "12 and 12": [(0, 12), (12, 24)],
    "9 and 15": [(0, 9), (9, 24)],
    "1 and 23": [(0, 1), (1, 24)],
    "0 and 24": [(0, 0), (0, 24)],
}
# Rows 0 to 4 have no token, so in each of these a term counts nothing somewhere.
KEPT_GATHERED = {"reduce": "window", "keeps": True}
MODES = {"microbatch": {}, "window": {"reduce": "window"}, "kept gathered": KEPT_GATHERED}


def three_terms(rank, cut, verb, keeps=False, **options):
    """Two windows into the same `.grad`; three terms, of which two may count nothing."""
    module = sharded(**({"reshard_after_forward": False} if keeps else {}))
    if keeps:
        module.set_reshard_after_backward(False)
    losses = [
        float(
            VERBS[verb](
                terms_of(module),
                rows(*CUTS[cut][rank]),
                module=module,
                microbatch_size=4,
                weight=weight,
                **options,
            )
        )
        for _ in range(2)
    ]
    return losses, full_gradients(module)


LAW = {
    (mode, cut, verb): TWO.case(
        lambda rank, o=options, c=cut, v=verb: three_terms(rank, c, v, **o),
        f"{mode}, {cut}, {verb}",
    )
    for mode, options in MODES.items()
    for cut in CUTS
    for verb in ("backward", "loss")
    # What hands over is the same for all cuts.
    if verb == "backward" or cut == "9 and 15"
}


@pytest.mark.parametrize(("mode", "cut", "verb"), LAW)
def test_gradients_and_loss_are_those_of_the_uncut_batch(mode, cut, verb):
    loss, due = uncut(net(), terms_of)
    for losses, found in LAW[mode, cut, verb]():
        assert_close(losses, [loss, loss])
        assert_all_close(found, [2 * gradient for gradient in due])


@TWO.case
def nothing_counts(rank):
    module = sharded()
    batch = rows(12 * rank, 12 * rank + 12)
    batch["a"] = torch.zeros_like(batch["a"])
    loss = vb.backward(
        lambda given: terms_of(module)(given)["tokens"],
        batch,
        module=module,
        microbatch_size=4,
        weight=lambda given: given["a"].sum(),
    )
    return float(loss), full_gradients(module)


def test_a_window_in_which_nothing_counts_has_the_loss_and_the_gradient_zero():
    for loss, gradients in nothing_counts():
        assert loss == 0
        assert [None if x is None else x.any() for x in gradients[:8]] == [False] * 8


@TWO.case
def windows_of_other_lengths(rank):
    """Three micro-batches as they came beside a batch in four."""
    module = sharded()
    given = Window([rows(0, 1), rows(1, 4), rows(4, 9)]) if rank == 0 else rows(9, 24)
    size = {} if rank == 0 else {"microbatch_size": 4}
    loss = vb.backward(mse_of(module), given, module=module, **size)
    return float(loss), full_gradients(module)


def test_ranks_may_have_a_window_and_a_batch():
    loss, due = uncut(net(), mse_of)
    for found, gradients in windows_of_other_lengths():
        assert_close(found, loss)
        assert_all_close(gradients, due)


@TWO.case
def calls_and_aux(rank):
    calls = []
    module = sharded()

    def loss_fn(batch):
        # Where shapes are ambiguous, the loss runs on shapes alone as well, on this rank only.
        calls.append(len(batch["x"]) if type(batch["x"]) is torch.Tensor else "shapes")
        return mse_of(module)(batch), batch["y"][:, 0]

    batch = rows(*[(0, 3), (3, 24)][rank])
    for _ in range(2):
        _, aux = vb.backward(loss_fn, batch, module=module, microbatch_size=4, has_aux=True)
    return calls, aux, full_gradients(module)


def test_all_ranks_run_as_many_micro_batches_and_aux_is_of_their_own_rows():
    (few, first, one), (many, second, other) = calls_and_aux()
    assert few == [1] * 6 + ["shapes"] + [1] * 6
    assert many == [4, 4, 4, 3, 3, 3] * 2
    assert torch.equal(torch.cat([first, second]), rows(0, ROWS)["y"][:, 0])
    _, due = uncut(net(), mse_of)
    for gradients in (one, other):
        assert_all_close(gradients, [2 * x for x in due])


@TWO.case
def evaluation(rank):
    module = fully_shard(net())
    options = {"module": module, "microbatch_size": 5}
    batch = rows(*CUTS["1 and 23"][rank])
    with torch.no_grad():
        before = float(vb.loss(mse_of(module), batch, **options))
        # As a user does it, who leaves the outermost module gathered.
        module(batch["x"])
    loss = vb.backward(mse_of(module), batch, **options)
    return before, float(loss), full_gradients(module)


def test_evaluation_runs_in_step_and_training_goes_on_after_it():
    loss, due = uncut(net(), mse_of)
    for before, found, gradients in evaluation():
        assert_close([before, found], [loss, loss])
        assert_all_close(gradients, due)


@TWO.case
def scaled_loss(rank):
    module = sharded()
    found = vb.loss(
        mse_of(module), rows(12 * rank, 12 * rank + 12), module=module, microbatch_size=4
    )
    (3 * found).backward()
    return full_gradients(module)


def test_a_loss_hands_over_shards_times_what_arrives():
    _, due = uncut(net(), mse_of)
    for gradients in scaled_loss():
        assert_all_close(gradients, [3 * x for x in due])


@TWO.case
def batchnorm(rank):
    module = fully_shard(with_batchnorm())
    for cut in ("12 and 12", "0 and 24"):
        batch = rows(*CUTS[cut][rank])
        vb.backward(
            lambda given: module(given["x"]).square().mean(),
            batch,
            module=module,
            microbatch_size=6,
        )
    return [x.numpy() for x in (module[0].running_mean, module[0].running_var)], module.training


def test_batchnorm_hears_the_rows_of_all_ranks_and_no_filler():
    module = with_batchnorm()
    for _ in range(2):
        module(rows(0, ROWS)["x"])
    due = [module[0].running_mean.numpy(), module[0].running_var.numpy()]
    for found, is_training in batchnorm():
        assert_all_close(found, due)
        assert is_training


@TWO.case
def divided_by_one(rank):
    module = sharded()
    for layer in (module, *module.blocks, module.tokens, module.rows):
        layer.set_gradient_divide_factor(1.0)
    steps(module, *CUTS["9 and 15"][rank])
    return full_gradients(module)


def test_a_divide_factor_of_the_user_is_known():
    _, due = uncut(net(), mse_of)
    for gradients in divided_by_one():
        assert_all_close(gradients, due)


def told(rank, world):
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("virtualbatch").addHandler(handler)
    module = sharded()
    for _ in range(2):
        steps(module, 12 * rank, 12 * rank + 12)
    return texts


@pytest.mark.proves_itself
def test_that_the_law_cannot_be_tried_is_told_once():
    for texts in run(told, 2):
        assert len(texts) == 1
        assert "could not be tried (its module runs on all ranks at once" in texts[0]
