"""`rowwise` on several ranks: inside what DistributedDataParallel wraps, and what is refused."""

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.coupled import network, rows
from tests.torch.ranks import Cases
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

TWO = Cases(2)
CUT = [slice(0, 6), slice(6, 12)]


class Towers(nn.Module):
    def __init__(self, size=None):
        super().__init__()
        self.first, self.second = network(nn.BatchNorm1d(8).eval()), network()
        self.scale = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self._size = size

    def forward(self, x):
        def encode(x):
            return F.normalize(self.first(x), dim=1), F.normalize(self.second(-x), dim=1)

        if self._size is not None:
            # Not the whole of it, which may be sharded by now.
            towers = [self.first, self.second]
            encode = vb.rowwise(encode, module=towers, microbatch_size=self._size)
        return (*encode(x), self.scale)


class Gather(torch.autograd.Function):
    """The rows of all ranks, as a loss over all of them needs them."""

    @staticmethod
    def forward(ctx, x):
        found = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(found, x.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient[CUT[distributed.get_rank()]]


def contrastive(z, w, scale):
    logits = scale.exp() * z @ w.T
    return F.cross_entropy(logits, torch.arange(len(z)))


def gradients(module):
    return [p.grad.numpy().copy() for p in module.parameters()]


def uncut():
    module = Towers()
    contrastive(*module(rows(12))).backward()
    return gradients(module)


@TWO.case
def inside(rank):
    net = DistributedDataParallel(Towers(size=4))
    buckets = []

    def counted(state, bucket):
        buckets.append(bucket.index())
        reduced = distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return reduced.get_future().then(lambda done: done.value()[0])

    net.register_comm_hook(None, counted)
    for _ in range(2):
        net.zero_grad()
        z, w, scale = net(rows(12)[CUT[rank]])
        contrastive(Gather.apply(z), Gather.apply(w), scale).backward()
    return gradients(net.module), buckets


@pytest.mark.proves_itself
def test_inside_the_wrapped_module_buckets_are_reduced_once_per_update():
    for found, buckets in inside():
        assert_all_close(found, uncut())
        assert buckets == [0, 0]


@TWO.case
def in_a_window(rank):
    net = DistributedDataParallel(Towers(size=4))

    def loss_fn(x):
        z, w, scale = net(x)
        return contrastive(Gather.apply(z), Gather.apply(w), scale)

    vb.backward(loss_fn, rows(12)[CUT[rank]], module=net, microbatch_size=6)
    return gradients(net.module)


def test_inside_a_window_of_all_ranks():
    for found in in_a_window():
        assert_all_close(found, uncut())


@TWO.case
def in_parts_of_a_sharded_module(rank):
    net = fully_shard(Towers(size=4))
    z, w, scale = net(rows(12)[CUT[rank]])
    contrastive(Gather.apply(z), Gather.apply(w), scale).backward()
    return [p.grad.full_tensor().numpy() for p in net.parameters()]


def test_inside_a_sharded_module_that_gathers_its_parts_whole():
    for found in in_parts_of_a_sharded_module():
        assert_all_close(found, uncut())


@TWO.case
def refused(rank):
    texts = []
    for module, size in (
        (DistributedDataParallel(network()), 4),
        (fully_shard(network()), 4),
        (network(), "auto"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - returned, and read outside
            vb.rowwise(module, microbatch_size=size)(rows(12))
        texts.append(str(error.value))
    return texts


def test_what_is_refused_on_several_ranks():
    for replicated, sharded, planned in refused():
        assert replicated.startswith("rowwise goes inside the module that DistributedDataParallel")
        assert "Call rowwise in the module's own forward." in replicated
        assert "Got FSDPSequential, which gathers them while it runs" in sharded
        assert "Got a group of 2. Plan the function alone" in planned
