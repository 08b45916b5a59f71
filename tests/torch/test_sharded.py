"""The law with fully sharded modules: any rows on any rank, in step, and as of one uncut batch."""

import logging

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases, run
from tests.torch.replicated import ROWS, VERBS, rows, uncut, weight, with_batchnorm
from tests.torch.sharded import full_gradients, mse_of, net, sharded, steps, terms_of
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

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
    for verb in VERBS
    # What hands over is the same for all cuts.
    if verb == "backward" or cut == "9 and 15"
}


@pytest.mark.parametrize(("mode", "cut", "verb"), LAW)
def test_gradients_and_loss_are_those_of_the_uncut_batch(mode, cut, verb):
    loss, due = uncut(net(), terms_of)
    for losses, found in LAW[mode, cut, verb]():
        assert_close(losses, [loss, loss])
        assert_all_close(found, [2 * gradient for gradient in due])


def wanted(x, y):
    """The gradient of a row of zeros is NaN: a norm of zeros, and 0 divided by 0."""
    return ((x.square().sum(1) + 0).sqrt() * y.sum(1)).sum() / y.sum()


def norm_of(module):
    return lambda batch: wanted(module(batch["x"]), batch["a"])


def plain():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)]).double()


@TWO.case
def fillers_of_nan(rank):
    module = plain()
    for layer in module:
        fully_shard(layer)
    fully_shard(module)
    loss = vb.backward(
        norm_of(module),
        rows(*[(0, 0), (0, 24)][rank]),
        module=module,
        microbatch_size=4,
        weight=lambda batch: batch["a"].sum(),
    )
    return float(loss), full_gradients(module)


def test_the_gradient_of_a_filler_may_be_nan():
    loss, due = uncut(plain(), norm_of)
    assert torch.isnan(
        torch.autograd.grad(wanted(z := torch.zeros(1, 6).requires_grad_(), z), z)[0]
    ).all()
    for found, gradients in fillers_of_nan():
        assert_close(found, loss)
        assert_all_close(gradients, due)


def layers(*, outer=True):
    """Layers that are gathered one at a time."""
    module = plain()
    for layer in module:
        fully_shard(layer)
    return fully_shard(module) if outer else module


def checkpointed(module, reentrant):
    def loss_fn(batch):
        x = batch["x"].clone().requires_grad_(reentrant)
        for layer in module:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return wanted(x, batch["a"])

    return loss_fn


def penalised(module):
    """A penalty outside of the forward pass, of parameters that are still gathered then."""

    def loss_fn(batch):
        loss = wanted(module(batch["x"]), batch["a"])
        return {"loss": loss, "penalty": sum(p.square().sum() for p in module.parameters())}

    return loss_fn


def of_loss(batch):
    return batch["a"].sum()


def of_each(batch):
    return {"loss": batch["a"].sum(), "penalty": None}


# Module -> loss, its weight, and how the module is sharded.
KINDS = {
    "no outer module": (norm_of, of_loss, lambda: layers(outer=False)),
    "checkpoints": (lambda m: checkpointed(m, False), of_loss, lambda: layers(outer=False)),
    "reentrant ones": (lambda m: checkpointed(m, True), of_loss, lambda: layers(outer=False)),
    "all gathered at once": (penalised, of_each, lambda: fully_shard(plain())),
}


def of_kind(rank, kind, cut, through):
    """By a backward function, which must not meet what is NaN, or by none."""
    loss_of, weigh, make = KINDS[kind]
    module = make()
    options = {}
    seen = []
    if through:
        options["backward_fn"] = lambda loss: (seen.append(float(loss.detach())), loss.backward())
    batch = rows(*CUTS[cut][rank])
    options |= {"module": module, "microbatch_size": 4, "weight": weigh}
    loss = vb.backward(loss_of(module), batch, **options)
    return float(loss), seen, full_gradients(module)


FOUND = {
    (kind, cut, through): TWO.case(
        lambda rank, k=kind, c=cut, t=through: of_kind(rank, k, c, t), f"{kind}, {cut}, {through}"
    )
    for kind in KINDS
    for cut, through in (("1 and 23", False), ("0 and 24", True))
}


@pytest.mark.parametrize(("kind", "cut", "through"), FOUND)
def test_ways_to_gather(kind, cut, through):
    loss, due = uncut(plain(), KINDS[kind][0])
    for found, seen, gradients in FOUND[kind, cut, through]():
        assert_close(found, loss)
        assert_all_close(gradients, due)
        assert len(seen) == (6 if through else 0)
        assert not torch.tensor(seen).isnan().any()


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
    module = sharded()
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


@TWO.case
def in_bfloat16(rank):
    """Sums 256, 1, 1, ... on one rank, and 2, 2, ... on the other: 256 + 1 is 256 in bfloat16."""
    module = fully_shard(nn.Linear(1, 1, bias=False).bfloat16())
    x = torch.ones(9 * (rank + 1), 1, dtype=torch.bfloat16)
    x[0] = 1 if rank else 256
    vb.backward(lambda x: module(x).float().mean(), x, module=module, microbatch_size=rank + 1)
    return full_gradients(module)[0]


def test_shards_of_half_precision_are_summed_in_float32():
    for gradient in in_bfloat16():
        assert_close(gradient, [[282 / 27]], rtol=2.0**-8)


@TWO.case
def mixed_precision(rank):
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    found = []
    for reduce in ("microbatch", "window"):
        module = sharded(net().float(), mp_policy=policy)
        batch = {name: x.float() for name, x in rows(*CUTS["9 and 15"][rank]).items()}
        vb.backward(mse_of(module), batch, module=module, microbatch_size=3, reduce=reduce)
        found.append(full_gradients(module))
    return found


def test_mixed_precision_is_as_near_as_one_pass_in_it():
    _, due = uncut(net(), mse_of)
    for by_mode in mixed_precision():
        for found in by_mode:
            assert_all_close(found, due, rtol=0.05)


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
