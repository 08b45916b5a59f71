"""BatchNorm over ranks: one momentum update a window, with the moments of all rows."""

from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.ranks import Cases
from tests.torch.replicated import gradients, mse_of, rows, uncut, with_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

TWO = Cases(2, limit=10, group_limit=5)


def statistics(rank, cuts, windows):
    net = DistributedDataParallel(with_batchnorm())
    for _ in range(windows):
        net.zero_grad()
        vb.backward(mse_of(net), shifted(rows(*cuts[rank])), module=net, microbatch_size=4)
    first, second = net.module[0], net.module[3]
    found = [first.running_mean, first.running_var, first.num_batches_tracked]
    return [x.numpy() for x in found], second.running_var.numpy().tobytes()


def shifted(batch):
    return {**batch, "x": 3 * batch["x"] + 50}


CUTS = {
    "12 and 12": [(0, 12), (12, 24)],
    "5 and 19": [(0, 5), (5, 24)],
    "0 and 24": [(0, 0), (0, 24)],
}
STATISTICS = {
    name: TWO.case(partial(statistics, cuts=cuts, windows=3), f"BatchNorm {name}")
    for name, cuts in CUTS.items()
}


@pytest.mark.parametrize("name", CUTS)
def test_batchnorm_has_the_moments_of_all_rows(name):
    module = with_batchnorm()
    for _ in range(3):
        module(shifted(rows(0, 24))["x"])
    layer = module[0]
    due = [x.numpy() for x in (layer.running_mean, layer.running_var, layer.num_batches_tracked)]
    results = STATISTICS[name]()
    for found, _ in results:
        # The sum of squares is some 300 times the variance.
        assert_all_close(found, due)
    assert len({second for _, second in results}) == 1


def first_windows(rank, verb):
    """Rank 0 has no row in two windows: PyTorch broadcasts buffers, and then new buckets."""
    net = DistributedDataParallel(with_batchnorm(), bucket_cap_mb=0.0005)
    for _ in range(2):
        net.zero_grad()
        loss = getattr(vb, verb)(mse_of(net), rows(0, 24 * rank), module=net, microbatch_size=24)
        if verb == "loss":
            loss.backward()
    return gradients(net.module)


FIRST = {
    verb: TWO.case(partial(first_windows, verb=verb), f"first windows {verb}")
    for verb in ("backward", "loss")
}


@pytest.mark.parametrize("verb", FIRST)
def test_no_rank_waits_for_buffers_or_buckets_of_one_without_rows(verb):
    _, due = uncut(with_batchnorm(), mse_of)
    for found in FIRST[verb]():
        assert_all_close(found, due)


class Twice(nn.Module):
    """Calls its layer twice, so it takes two updates a window; the second is of other values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, momentum=None).double()
        self.head = nn.Linear(6, 6).double()

    def forward(self, x):
        return self.head(self.norm(x) + self.norm(x.square() + 7))


@TWO.case
def twice(rank):
    torch.manual_seed(2)
    net = DistributedDataParallel(Twice())
    vb.backward(mse_of(net), rows(0, 24 * rank), module=net, microbatch_size=5)
    norm = net.module.norm
    return [x.numpy() for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]


def test_a_rank_without_rows_knows_how_often_a_layer_was_called():
    module = Twice()
    x = rows(0, 24)["x"]
    module(x)
    norm = module.norm
    due = [x.numpy() for x in (norm.running_mean, norm.running_var, norm.num_batches_tracked)]
    for found in twice():
        assert_all_close(found, due)


class Centred(nn.Module):
    """Takes off a moving average of its inputs, which a forward pass moves."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 6).double()
        self.register_buffer("average", torch.zeros(6, dtype=torch.float64))

    def forward(self, x):
        with torch.no_grad():
            self.average.lerp_(x.mean(0), 0.1)
        return self.last(x - self.average)


def own_buffers(rank, broadcast):
    net = DistributedDataParallel(Centred(), forward_sync_buffers=broadcast)
    seen = []

    def loss_fn(batch):
        seen.append(net.module.average.clone().numpy().tobytes())
        return mse_of(net)(batch)

    for _ in range(3):
        vb.backward(loss_fn, rows(*CUTS["5 and 19"][rank]), module=net, microbatch_size=19)
    return seen


OWN = {
    broadcast: TWO.case(partial(own_buffers, broadcast=broadcast), f"buffers {broadcast}")
    for broadcast in (True, False)
}


@pytest.mark.parametrize("broadcast", OWN)
def test_windows_begin_with_the_other_buffers_of_rank_0(broadcast):
    first, second = OWN[broadcast]()
    assert len(set(first)) == 3
    # As in every forward pass of DDP alone, unless it is told not to.
    assert (first == second) == broadcast
