"""Compiled modules over ranks, with the wrapper outside and inside."""

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch import ranks
from tests.torch.replicated import gradients, mse_of, network, rows, uncut
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb


def compiled(rank, world, outside):
    inner = network()
    if outside:
        net = DistributedDataParallel(inner)
        called = torch.compile(net, backend="aot_eager")
    else:
        net = called = DistributedDataParallel(torch.compile(inner, backend="aot_eager"))
    for _ in range(2):
        net.zero_grad()
        cut = [(0, 5), (5, 24)][rank]
        vb.backward(mse_of(called), rows(*cut), module=called, microbatch_size=5)
    return gradients(inner)


@pytest.mark.thorough("compiles for seconds in each process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("outside", [False, True])
def test_compiled_inside_or_outside(outside):
    _, due = uncut(network(), mse_of)
    for found in ranks.run(compiled, 2, outside, limit=80, group_limit=60):
        assert_all_close(found, due)
