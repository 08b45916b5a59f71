"""A rank that fails inside a window: all learn it at once, nothing is written, training goes on."""

import os
import re
import signal
import time
from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch import ranks
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
    with_batchnorm,
)
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb
from virtualbatch.torch._replicas.agreement import is_common

TWO = Cases(2)
UNEVEN = [(0, 8), (8, 24)]
OTHER = r"RuntimeError: Another rank failed in this window\. Got an error on another of 2 ranks"
RAN_OUT = "CUDA out of memory. Tried to allocate 2 GiB"


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def fails(rank, verb, what):
    """What a rank did, its seconds, how often its loss ran; then what was left and came after."""
    # BatchNorm takes no single row, and a size that ran out of memory stays small.
    single = what == "has no memory for a row"
    net = DistributedDataParallel(network() if single else with_batchnorm())
    calls, armed = [], [False]
    own = torch.ones(6, dtype=torch.float64, requires_grad=True)

    def loss_fn(batch):
        calls.append(len(batch["x"]))
        if armed[0] and rank == 1 and len(calls) == 2:
            if what == "raises":
                raise ValueError("a bug of the user")
            if what == "is interrupted":
                raise KeyboardInterrupt
            if what == "raises in backward":
                return FailsInBackward.apply(mse_of(net)(batch), ValueError("a bug of the user"))
        if armed[0] and rank == 1 and what == "trains a tensor of its own":
            return (net(batch["x"]) * own - batch["y"]).square().mean()
        if armed[0] and rank == 1 and what == "has no memory for a row":
            raise torch.OutOfMemoryError(RAN_OUT)
        return mse_of(net)(batch)

    def weigh(batch):
        if armed[0] and rank == 1 and what == "weight raises":
            raise KeyError("mask")
        return (
            float("nan") if armed[0] and rank == 1 and what == "weight is NaN" else len(batch["x"])
        )

    batch = rows(*UNEVEN[rank])
    options = {"module": net, "microbatch_size": 4, "weight": weigh}
    VERBS[verb](loss_fn, batch, **options)
    kept = [p.grad for p in net.parameters()]
    values = [grad.clone() for grad in kept]
    buffers = [buffer.clone() for buffer in net.buffers()]
    armed[0] = True
    calls.clear()
    given = dict(batch)
    if rank == 1 and what == "leaves are unequal":
        given["y"] = given["y"][1:]
    began = time.monotonic()
    try:
        VERBS[verb](loss_fn, given, **options)
        happened = "nothing"
    except BaseException as error:  # An interrupt is one of the cases.
        happened = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    ran = len(calls)
    as_before = all(
        p.grad is grad and torch.equal(grad, value)
        for p, grad, value in zip(net.parameters(), kept, values, strict=True)
    ) and all(map(torch.equal, net.buffers(), buffers))
    armed[0] = False
    net.zero_grad()
    VERBS[verb](loss_fn, batch, **options)
    again = gradients(net.module)
    return happened, seconds, ran, as_before, again, [value.numpy() for value in values]


# What fails -> what that rank raises, and whether all know it before any forward pass.
FAULTS = {
    "raises": (r"ValueError: a bug of the user", False),
    "raises in backward": (r"ValueError: a bug of the user", False),
    "trains a tensor of its own": (r"ValueError: module must hold every tensor that takes", False),
    "is interrupted": (r"KeyboardInterrupt: ", False),
    "has no memory for a row": (r"MemoryError: .*one row", False),
    "weight raises": (r"KeyError: 'mask'", True),
    "weight is NaN": (r"ValueError: .*nan", True),
    "leaves are unequal": (r"ValueError: All arrays of a batch must have the same", True),
}
FAILED = {
    (verb, what): TWO.case(partial(fails, verb=verb, what=what), f"{verb} {what}")
    for verb in VERBS
    for what in FAULTS
}


@pytest.mark.parametrize(("verb", "what"), FAILED)
def test_an_error_on_one_rank_is_one_on_all_and_leaves_no_trace(verb, what):
    own, at_once = FAULTS[what]
    (other, *first), (failed, *second) = FAILED[verb, what]()
    assert re.match(OTHER, other)
    assert re.match(own, failed)
    for seconds, ran, as_before, again, due in (first, second):
        assert seconds < 1
        assert as_before
        assert not (at_once and ran)
        assert_all_close(again, due)


def runs_out(rank, verb, where):
    inner = network()
    net = DistributedDataParallel(inner)
    terms = terms_of(net, inner)
    tried = []

    def loss_fn(batch):
        tried.append(len(batch["x"]))
        if rank == 1 and len(batch["x"]) > 2:
            if where == "forward":
                raise torch.OutOfMemoryError(RAN_OUT)
            found = terms(batch)
            return {
                k: FailsInBackward.apply(x, torch.OutOfMemoryError(RAN_OUT))
                for k, x in found.items()
            }
        return terms(batch)

    options = {"module": net, "microbatch_size": 8, "weight": weight}
    VERBS[verb](loss_fn, rows(*UNEVEN[rank]), **options)
    return gradients(inner), tried


RAN = {
    (verb, where): TWO.case(partial(runs_out, verb=verb, where=where), f"{verb} out in {where}")
    for verb in VERBS
    for where in ("forward", "backward")
}


@pytest.mark.parametrize(("verb", "where"), RAN)
def test_a_rank_that_runs_out_of_memory_cuts_its_own_rows_again(verb, where):
    _, due = uncut(network(), lambda net: terms_of(net, net))
    (first, calm), (second, tried) = RAN[verb, where]()
    assert calm == [8]
    assert max(tried) == 8
    assert sum(n for n in tried if n <= 2) == 16
    assert_all_close(first, due)
    assert_all_close(second, due)


@TWO.case
def other_terms(rank):
    net = DistributedDataParallel(network())
    names = [("tokens", "penalty"), ("tokens", "other")][rank]
    calls = []

    def weigh(batch):
        return dict.fromkeys(names, len(batch["x"]))

    def terms(batch):
        calls.append(1)
        return dict.fromkeys(names, mse_of(net)(batch))

    with pytest.raises(ValueError, match=r"All ranks must return the same terms\. Got (.*) here\."):
        vb.backward(
            terms,
            rows(0, 4),
            module=net,
            microbatch_size=2,
            weight=lambda b: dict.fromkeys(names, 2),
        )
    return len(calls)


def test_other_terms_on_another_rank_are_refused_on_both():
    assert other_terms() == [0, 0]


@pytest.mark.parametrize("count", [2, 3, 64, 1024])
def test_one_other_code_among_many_is_told(count):
    """Codes are hashes of 16 bits; two that are next to each other are the hardest to tell."""
    for code in (1, 2, 40_000, 2**16 - 1):
        others = code * (count - 1)
        assert is_common(count, others + code, others * code + code**2)
        assert not is_common(count, others + code + 1, others * code + (code + 1) ** 2)


@TWO.case
def no_rows(rank):
    net = DistributedDataParallel(network())
    with pytest.raises(
        ValueError, match=r"must have a row on at least one rank\. Got none on any of 2 ranks\."
    ):
        vb.backward(mse_of(net), rows(0, 0), module=net, microbatch_size=2)
    return gradients(net.module) == [None] * 4


def test_no_row_on_any_rank_is_refused_on_all():
    assert no_rows() == [True, True]


@pytest.mark.parametrize("when", ["in a micro-batch", "in weight"])
def test_a_rank_that_dies_is_an_error_on_the_other(when):
    def dies(rank, world):
        net = DistributedDataParallel(with_batchnorm())

        def killed(batch):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(batch["x"])

        def loss_fn(batch):
            if when == "in a micro-batch":
                killed(batch)
            return mse_of(net)(batch)

        weigh = killed if when == "in weight" else None
        before = [buffer.clone() for buffer in net.buffers()]
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            vb.backward(loss_fn, rows(0, 8), module=net, microbatch_size=4, weight=weigh)
        untouched = all(map(torch.equal, net.buffers(), before))
        return time.monotonic() - began, untouched, gradients(net.module) == [None] * 8

    survivor, dead = ranks.outcomes(dies, 2)
    assert dead.ended == "died"
    assert survivor.ended == "returned", survivor
    seconds, *as_before = survivor.value
    assert seconds < 1
    assert as_before == [True, True]
