"""Finished gradients become `.grad` themselves: what is handed over is not copied."""

import pytest
import torch
from tests.torch import ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb


def by_backward(loss_fn, rows, module):
    vb.backward(loss_fn, rows, module=module, microbatch_size=2)


def by_loss(loss_fn, rows, module):
    loss = vb.loss(loss_fn, rows, module=module, microbatch_size=2)
    loss.backward()


def places(gradients, module):
    """Where each gradient is when it is handed over, and where `.grad` is then."""
    given = {}
    for parameter in module.parameters():
        # It hears the gradient of the whole window, before that becomes `.grad`.
        parameter.register_hook(lambda g, p=parameter: given.update({p: g.data_ptr()}))
    gradients(lambda x: module(x).square().mean(), torch.randn(6, 4), module)
    return [(given[parameter], parameter.grad.data_ptr()) for parameter in module.parameters()]


def over_ranks(rank, world, gradients):
    return places(gradients, DistributedDataParallel(nn.Linear(4, 3)))


@pytest.mark.parametrize("gradients", [by_backward, by_loss])
def test_ranks_hand_over_without_a_copy(gradients):
    for found in ranks.run(over_ranks, 2, gradients):
        assert len(found) == 2
        assert all(given == kept for given, kept in found)


def test_a_loss_hands_over_without_a_copy():
    found = places(by_loss, nn.Linear(4, 3))
    assert len(found) == 2
    assert all(given == kept for given, kept in found)
