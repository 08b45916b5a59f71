"""Kinds of fully sharded modules and losses: what gathers when, NaN in fillers, half precision."""

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases
from tests.torch.replicated import rows, uncut
from tests.torch.sharded import full_gradients, mse_of, net, sharded
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb

TWO = Cases(2, limit=60)
CUTS = {"9 and 15": [(0, 9), (9, 24)], "1 and 23": [(0, 1), (1, 24)], "0 and 24": [(0, 0), (0, 24)]}


def wanted(x, y):
    """The gradient of a row of zeros is NaN: a norm of zeros, and 0 divided by 0."""
    return ((x.square().sum(1) + 0).sqrt() * y.sum(1)).sum() / y.sum()


def norm_of(module):
    return lambda batch: wanted(module(batch["x"]), batch["a"])


def plain():
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)]).double()


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
    "an outer module": (norm_of, of_loss, layers),
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


def test_the_gradient_of_a_row_of_zeros_is_nan_in_these_losses():
    zeros = torch.zeros(1, 6).requires_grad_()
    assert torch.autograd.grad(wanted(zeros, zeros), zeros)[0].isnan().all()


@pytest.mark.parametrize(("kind", "cut", "through"), FOUND)
def test_gradients_and_loss_are_those_of_the_uncut_batch(kind, cut, through):
    loss, due = uncut(plain(), KINDS[kind][0])
    for found, seen, gradients in FOUND[kind, cut, through]():
        assert_close(found, loss)
        assert_all_close(gradients, due)
        assert len(seen) == (6 if through else 0)
        assert not torch.tensor(seen).isnan().any()


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
