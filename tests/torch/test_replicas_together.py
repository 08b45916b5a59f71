"""Windows whose loss is one of several, or is not differentiated as a whole."""

from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.ranks import Cases
from tests.torch.replicated import gradients, rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

# PyTorch's advice to those who look for unused parameters and have none.
pytestmark = pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")

TWO = Cases(2)
CUTS = [(0, 5), (5, 24)]
FIND = (False, True)


class Heads(nn.Module):
    """One body with heads of which each call uses one, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(6, 5).double()
        self.a, self.b, self.c = (nn.Linear(5, 1).double() for _ in range(3))

    def forward(self, x, head):
        return getattr(self, head)(torch.tanh(self.body(x)))


def of(net, head):
    return lambda batch: net(batch["x"], head).square().mean()


def penalty(net):
    return sum(p.square().sum() for p in net.parameters())


def in_one_pass(loss):
    (loss("a") + 2 * loss("b")).backward()


def one_after_the_other(loss):
    first, second = loss("a"), 2 * loss("b")
    first.backward()
    second.backward()


def with_a_penalty(loss):
    (loss("a") + penalty(loss.net)).backward()


WAYS = {way.__name__: way for way in (in_one_pass, one_after_the_other, with_a_penalty)}


class Ours:
    def __init__(self, net, cut):
        self.net, self.cut = net, cut

    def __call__(self, head):
        return vb.loss(of(self.net, head), rows(*self.cut), module=self.net, microbatch_size=4)


class Uncut:
    def __init__(self, net):
        self.net = net

    def __call__(self, head):
        return of(self.net, head)(rows(0, 24))


def several(rank, way, find):
    net = DistributedDataParallel(Heads(), find_unused_parameters=find)
    found = []
    for _ in range(2):
        net.zero_grad()
        WAYS[way](Ours(net, CUTS[rank]))
        found.append(gradients(net.module))
    return found


SEVERAL = {
    (way, find): TWO.case(partial(several, way=way, find=find), f"{way} {find}")
    for way in WAYS
    for find in FIND
}


@pytest.mark.parametrize(("way", "find"), SEVERAL)
def test_no_loss_takes_away_what_another_gives(way, find):
    module = Heads()
    WAYS[way](Uncut(module))
    due = gradients(module)
    for found in SEVERAL[way, find]():
        for window in found:
            assert [x is None for x in window] == [x is None for x in due]
            pairs = [(x, y) for x, y in zip(window, due, strict=True) if y is not None]
            assert_all_close([x for x, _ in pairs], [y for _, y in pairs])


@TWO.case
def partly(rank):
    net = DistributedDataParallel(Heads())
    loss = Ours(net, CUTS[rank])("a")
    texts = []
    for partial_pass in (
        lambda: torch.autograd.grad(loss, list(net.parameters())),
        lambda: loss.backward(inputs=[net.module.body.weight]),
    ):
        with pytest.raises(RuntimeError) as caught:
            partial_pass()
        texts.append(str(caught.value))
    loss.backward()
    return texts, gradients(net.module)[0]


def test_a_backward_pass_that_adds_up_a_part_is_refused_and_one_of_all_is_still_possible():
    module = Heads()
    Uncut(module)("a").backward()
    for texts, found in partly():
        assert all("Call backward() on the loss" in text for text in texts)
        assert_all_close([found], [gradients(module)[0]])


@TWO.case
def under_autocast(rank):
    net = DistributedDataParallel(Heads().float())
    batch = {"x": rows(*CUTS[rank])["x"].float()}

    def wide(batch):
        with torch.autocast("cpu", enabled=False):
            return of(net, "a")(batch)

    found = []
    for reduce in ("window", "overlapped"):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            vb.backward(wide, batch, module=net, microbatch_size=4, reduce=reduce)
        found.append(gradients(net.module)[:4])
    return found


def test_autocast_does_not_choose_again_in_the_last_backward_pass():
    for window, overlapped in under_autocast():
        for x, y in zip(window, overlapped, strict=True):
            torch.testing.assert_close(torch.tensor(y), torch.tensor(x), rtol=1e-5, atol=1e-6)
