"""One of two ranks fails at a random point of a window: no hang, and an error or the exact update.

What raises does so in the weight, the loss or its backward pass. A rank that is killed is so at any
line of Python: before a message, between two, or while gradients meet.
"""

import os
import random
import signal
import sys
import time
from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.tiers import tiered
from tests.torch import ranks
from tests.torch.ranks import Cases
from tests.torch.replicated import VERBS, gradients, network, rows, terms_of, uncut, weight
from torch import nn
from torch.nn.parallel import DistributedDataParallel

UNEVEN = [(0, 8), (8, 24)]
RAN_OUT = "CUDA out of memory. Tried to allocate 2 GiB"
ERRORS = {"raises": ValueError("a bug of the user"), "runs out": torch.OutOfMemoryError(RAN_OUT)}


class Points:
    """Counts the points of a window, and fails at one of them."""

    def __init__(self):
        self.count = 0
        self.at = 0
        self.error = None

    def passed(self):
        self.count += 1
        if self.count == self.at:
            raise self.error


class Point(torch.autograd.Function):
    """One point on the way there, and one on the way back."""

    @staticmethod
    def forward(ctx, x, points):
        ctx.points = points
        points.passed()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.points.passed()
        return gradient.clone(), None


class WithPoints(nn.Module):
    def __init__(self, points):
        super().__init__()
        self.net, self.points = network(), points

    def forward(self, x):
        x = Point.apply(x.clone().requires_grad_(), self.points)
        for layer in self.net:
            x = Point.apply(layer(x), self.points)
        return x


def window(points, verb):
    """A module, and a window of this rank as a function without arguments."""
    net = DistributedDataParallel(WithPoints(points))

    def weigh(batch):
        points.passed()
        return weight(batch)

    def run(rank):
        VERBS[verb](
            terms_of(net, net.module.net),
            rows(*UNEVEN[rank]),
            module=net,
            microbatch_size=4,
            weight=weigh,
        )

    return net.module.net, run


def fails_at(rank, verb, what, where):
    """What this rank did; its gradients after that, and those of one more window."""
    points = Points()
    module, run = window(points, verb)
    run(rank)
    if rank == 1:
        points.at = 1 + int(where * points.count)
        points.error = ERRORS[what]
    points.count = 0
    module.zero_grad()
    began = time.monotonic()
    try:
        run(rank)
        happened = "nothing"
    except (ValueError, RuntimeError, MemoryError) as error:
        happened = type(error).__name__
    seconds = time.monotonic() - began
    found = gradients(module)
    module.zero_grad()
    run(rank)
    return happened, seconds, found, gradients(module)


def is_killed_at(rank, world, verb, where):
    """The other rank's error and None, or None and its gradients."""
    module, run = window(Points(), verb)
    lines, last = 0, None

    def traced(frame, event, _):
        nonlocal lines
        lines += 1
        if lines == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return traced

    # The first window has lines of its own.
    run(rank)
    sys.settrace(traced)
    run(rank)
    sys.settrace(None)
    module.zero_grad()
    if rank == 1:
        lines, last = 0, 1 + int(where * lines)
        sys.settrace(traced)
    try:
        run(rank)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", None
    return None, gradients(module)


def drawn():
    """One hundred points: verb, what happens, and where in the window."""
    made = random.Random(11)
    # Not "overlapped", whose last backward pass is the reduction: what fails there, fails for all.
    verbs, kinds = ["backward", "loss"], ["raises", "runs out", "is killed"]
    return [(made.choice(verbs), made.choice(kinds), made.random()) for _ in range(100)]


ALL = drawn()
QUICK = ALL[:16]
RAISING = {
    group: [point for point in points if point[1] != "is killed"]
    for group, points in {"some": QUICK, "all": ALL[16:]}.items()
}
GROUPS = {"some": Cases(2), "all": Cases(2, limit=100)}
RAISED = {
    group: [
        GROUPS[group].case(
            partial(fails_at, verb=verb, what=what, where=where), f"{verb} {what} at {where}"
        )
        for verb, what, where in points
    ]
    for group, points in RAISING.items()
}


@pytest.mark.parametrize("group", tiered(GROUPS, ["some"], "further points of the same kind"))
def test_a_rank_that_raises_or_runs_out_of_memory(group):
    _, due = uncut(network(), lambda net: terms_of(net, net))
    ended = set()
    for (_, what, _), results in zip(RAISING[group], RAISED[group], strict=True):
        (other, *first), (own, *second) = results()
        assert other == ("nothing" if own == "nothing" else "RuntimeError")
        if what == "raises":
            assert own == "ValueError"
        ended.add(own)
        for seconds, found, again in (first, second):
            assert seconds < 1
            assert_all_close(found, due if own == "nothing" else [None] * len(due))
            assert_all_close(again, due)
    # Both endings are among the points.
    assert ended >= {"nothing", "ValueError"}


KILLED = [(verb, where) for verb, what, where in ALL if what == "is killed"]
SOME = [(verb, where) for verb, what, where in QUICK if what == "is killed"]


@pytest.mark.parametrize("point", tiered(KILLED, SOME, "further points of the same kind"))
def test_a_rank_that_is_killed(point):
    _, due = uncut(network(), lambda net: terms_of(net, net))
    survivor, killed = ranks.outcomes(is_killed_at, 2, *point)
    assert killed.ended == "died"
    assert survivor.ended == "returned", survivor
    error, found = survivor.value
    assert survivor.seconds < 5
    if error is None:
        assert_all_close(found, due)
