"""What DistributedDataParallel is made of: buckets, unused parameters, hooks, precision."""

from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.ranks import Cases
from tests.torch.replicated import (
    VERBS,
    gradients,
    mse_of,
    network,
    rows,
    terms_of,
    uncut,
    weight,
)
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb

# PyTorch's advice to those who look for unused parameters and have none.
pytestmark = pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")

TWO = Cases(2)
UNEVEN = [(0, 5), (5, 24)]
# The second window is the first with the buckets that PyTorch chose.
WINDOWS = 3


class Branches(nn.Module):
    """Rows whose first entry is above 0 go through `a`, others through `b`; nothing uses `c`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = (nn.Linear(6, 1).double() for _ in range(3))

    def forward(self, x):
        up = x[:, 0] > 0
        parts = [layer(x[rows]) for layer, rows in ((self.a, up), (self.b, ~up)) if rows.any()]
        return torch.cat(parts)


def branched(place):
    """Rows of which only one, at this place, goes through `b`."""
    x = rows(0, 24)["x"].clone()
    x[:, 0] = x[:, 0].abs()
    x[place, 0] *= -1
    return x


def some_unused(rank, verb, place, find):
    net = DistributedDataParallel(Branches(), find_unused_parameters=find)
    for _ in range(WINDOWS):
        net.zero_grad()
        VERBS[verb](
            lambda x: net(x).square().mean(),
            branched(place)[slice(*UNEVEN[rank])],
            module=net,
            microbatch_size=4,
        )
    return gradients(net.module)


# The first and the last micro-batch of one rank, and the only one of the other that has it.
PLACES = {"first": 5, "last": 23, "other rank": 2}
UNUSED = {
    (verb, place, find): TWO.case(
        partial(some_unused, verb=verb, place=PLACES[place], find=find), f"{verb} {place} {find}"
    )
    for verb in VERBS
    for place in PLACES
    for find in (False, True)
}


@pytest.mark.parametrize(("verb", "place", "find"), UNUSED)
def test_a_parameter_that_one_micro_batch_of_one_rank_reaches(verb, place, find):
    module = Branches()
    module(branched(PLACES[place])).square().mean().backward()
    due = gradients(module)
    assert due[-2:] == [None, None]
    for found in UNUSED[verb, place, find]():
        assert_all_close(found, due)


def with_kept_gradient(rank, find):
    net = DistributedDataParallel(Branches(), find_unused_parameters=find)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    x = branched(23)[slice(*UNEVEN[rank])]
    vb.backward(lambda x: net(x).square().mean(), x, module=net, microbatch_size=4)
    return gradients(net.module)


KEPT = {find: TWO.case(partial(with_kept_gradient, find=find), f"kept {find}") for find in (0, 1)}


@pytest.mark.parametrize("find", KEPT)
def test_a_kept_gradient_of_a_parameter_that_nothing_reaches_stays(find):
    module = Branches()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module(branched(23)).square().mean().backward()
    for found in KEPT[find]():
        assert_all_close(found, gradients(module))


def made(rank, verb, options, hook=None):
    inner = network()
    net = DistributedDataParallel(inner, **options)
    calls = []

    def counted(state, bucket):
        calls.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return hook(state, bucket)

    if hook is not None:
        net.register_comm_hook(distributed.group.WORLD, counted)
    found = []
    for _ in range(WINDOWS):
        net.zero_grad()
        calls.clear()
        VERBS[verb](
            terms_of(net, inner), rows(*UNEVEN[rank]), module=net, microbatch_size=4, weight=weight
        )
        found.append(gradients(inner))
    return found, calls


OPTIONS = {
    "bucket view": {"gradient_as_bucket_view": True},
    "unused parameters looked for": {"find_unused_parameters": True},
    "both": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
    "three buckets": {"bucket_cap_mb": 0.0005},
    "buffers never broadcast": {"forward_sync_buffers": False},
}
MADE = {
    (verb, name): TWO.case(partial(made, verb=verb, options=options), f"{verb} {name}")
    for verb in VERBS
    for name, options in OPTIONS.items()
}


@pytest.mark.parametrize(("verb", "name"), MADE)
def test_each_way_to_make_it(verb, name):
    _, due = uncut(network(), lambda net: terms_of(net, net))
    for windows, _ in MADE[verb, name]():
        for found in windows:
            assert_all_close(found, due)


compressed = TWO.case(
    partial(made, verb="backward", options={}, hook=fp16_compress_hook), "compressed"
)


def test_a_hook_that_compresses_is_called_once_and_loses_what_it_loses():
    _, due = uncut(network(), lambda net: terms_of(net, net))
    bytes_of_parameters = sum(8 * parameter.numel() for parameter in network().parameters())
    for windows, calls in compressed():
        assert calls == [bytes_of_parameters]
        # float16 has 10 bits; two ranks' parts, each divided and rounded, and their sum.
        assert_all_close(windows[-1], due, rtol=3 * 2.0**-10)


@TWO.case
def bfloat16(rank):
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    net = DistributedDataParallel(module.bfloat16())
    ones = torch.ones(1024, 1, dtype=torch.bfloat16)
    vb.backward(lambda x: net(x).mean(), ones, module=net, microbatch_size=1)
    return float(module.weight.grad), module.weight.grad.dtype


def test_half_precision_is_added_up_wide_and_reduced_once():
    assert bfloat16() == [(1.0, torch.bfloat16)] * 2


def scaled(rank, verb):
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    net = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        x = torch.full((4, 1), 2.0)
        x[3] *= factor if rank == 1 else 1.0
        if verb == "backward":
            vb.backward(
                lambda x: net(x).mean(),
                x,
                module=net,
                microbatch_size=2,
                backward_fn=lambda loss: scaler.scale(loss).backward(),
            )
        else:
            loss = vb.loss(lambda x: net(x).mean(), x, module=net, microbatch_size=2, scaler=scaler)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append((round(module.weight.item(), 6), scaler.get_scale()))
    return found


SCALED = {verb: TWO.case(partial(scaled, verb=verb), f"scaled {verb}") for verb in VERBS}


@pytest.mark.parametrize("verb", SCALED)
def test_an_infinite_gradient_of_one_rank_skips_the_step_on_both(verb):
    assert SCALED[verb]() == [[(0.8, 1024.0), (0.8, 512.0), (0.6, 512.0)]] * 2


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net = network()
        self.reentrant = reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()
        return self.net[2](checkpoint(self.net[:2], x, use_reentrant=self.reentrant))


def checkpointed(rank, reentrant, find):
    net = DistributedDataParallel(Checkpointed(reentrant), find_unused_parameters=find)
    for _ in range(WINDOWS):
        net.zero_grad()
        vb.backward(mse_of(net), rows(*UNEVEN[rank]), module=net, microbatch_size=4)
    return gradients(net.module)


CHECKPOINTED = {
    (reentrant, find): TWO.case(
        partial(checkpointed, reentrant=reentrant, find=find), f"checkpoint {reentrant} {find}"
    )
    for reentrant in (False, True)
    for find in (False, True)
}


@pytest.mark.parametrize(("reentrant", "find"), CHECKPOINTED)
def test_both_kinds_of_checkpointing(reentrant, find):
    _, due = uncut(network(), mse_of)
    for found in CHECKPOINTED[reentrant, find]():
        assert_all_close(found, due)


@TWO.case
def halved(rank):
    net = DistributedDataParallel(network())
    heard = []

    def half(gradient):
        heard.append(gradient is None)
        return gradient * 0.5

    for parameter in net.parameters():
        parameter.register_hook(half)
    found = []
    for verb in VERBS.values():
        net.zero_grad()
        heard.clear()
        verb(mse_of(net), rows(*UNEVEN[rank]), module=net, microbatch_size=4)
        found.append((gradients(net.module), list(heard)))
    return found


def test_a_hook_of_parameters_hears_one_gradient_a_window():
    _, due = uncut(network(), mse_of)
    for by_verb in halved():
        for found, heard in by_verb:
            assert_all_close(found, [gradient / 2 for gradient in due])
            assert heard == [False] * len(due)
