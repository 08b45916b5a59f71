"""Processes whose gradients nothing adds up, or in a way that cannot wait, are refused."""

import copy

import pytest
import torch
from tests.oracle import assert_close
from tests.torch.ranks import Cases
from tests.torch.replicated import mse_of, network, rows
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

TWO = Cases(2)
X = torch.ones(6, 2)


@pytest.fixture
def _one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_group_of_one_process_changes_nothing():
    ours = nn.Linear(2, 1)
    alone = copy.deepcopy(ours)
    ours(X).square().mean().backward()
    vb.backward(lambda x: alone(x).square().mean(), X, module=alone, microbatch_size=6)
    assert torch.equal(ours.weight.grad, alone.weight.grad)


@pytest.mark.usefixtures("_one_process")
def test_a_group_of_one_process_may_wrap_its_module():
    alone = nn.Linear(2, 1)
    wrapped = DistributedDataParallel(copy.deepcopy(alone))
    for module in alone, wrapped:
        vb.backward(lambda x, m=module: m(x).square().mean(), X, module=module, microbatch_size=4)
    assert torch.equal(alone.weight.grad, wrapped.module.weight.grad)


def refused(verb, module, text, **options):
    """Checks that a verb refuses, before the loss function is called."""
    calls = []
    with pytest.raises(ValueError, match=text):
        verb(calls.append, X, module=module, microbatch_size=2, **options)
    assert not calls
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*FSDP.*:UserWarning")
@pytest.mark.parametrize("verb", [vb.backward, vb.loss])
def test_fully_sharded_of_the_first_kind(verb):
    module = FullyShardedDataParallel(nn.Linear(2, 1), device_id=torch.device("cpu"))
    refused(
        verb,
        module,
        r"FullyShardedDataParallel of the first kind is not supported\. Got .* as module\. Use ",
    )


@pytest.mark.parametrize("verb", [vb.backward, vb.loss])
def test_arguments_that_say_how_to_add_up_what_nothing_adds_up(verb):
    module = nn.Linear(2, 1)
    text = r"Got reduce='window' and no such module\. Leave it out\."
    refused(verb, module, text, reduce="window")
    text = (
        r"module must be the wrapper that adds up gradients over ranks\. "
        r"Got Linear in group=str\. Pass the "
    )
    refused(verb, module, text, group="dp")


def refuses(rank, verb):
    net = DistributedDataParallel(nn.Linear(2, 1))
    plain = (
        r"must be the wrapper that adds up .*\. "
        r"Got (Linear|Sequential) in a process group of 2 ranks\. "
    )
    refused(verb, net.module, plain + r"Pass the DistributedDataParallel around it, such as ")
    refused(verb, nn.Sequential(nn.Linear(2, 1)), plain)
    loose = nn.Parameter(torch.ones(2))
    text = r"Got a parameter of shape \(2,\) that the DistributedDataParallel does not hold"
    with pytest.raises(ValueError, match=text):
        verb(lambda x: net(x).mean() + loose.sum(), X, module=[net, loose], microbatch_size=2)
    refused(verb, net, r"group=False is for .* Got it with DistributedDataParallel", group=False)
    refused(verb, net, r"'window' or 'overlapped'\. Got reduce='microbatch'", reduce="microbatch")
    apart = [distributed.new_group([n]) for n in range(2)][rank]
    text = r"over the same ranks\. Got ranks \[0, 1\] and \[" + str(rank) + r"\]\."
    refused(verb, net, text, group=apart)
    other = DistributedDataParallel(nn.Linear(2, 1), process_group=apart)
    refused(verb, nn.ModuleList([net, other]), text)
    static = DistributedDataParallel(nn.Linear(2, 1), static_graph=True)
    text = r"must not have static_graph=True: .* Got static_graph=True\. Leave it out: "
    refused(verb, static, text)
    # PyTorch wraps it on devices only.
    talking = DistributedDataParallel(nn.Sequential(nn.Linear(2, 1), nn.Identity()))
    talking.module[1] = nn.SyncBatchNorm(1, affine=False)
    refused(
        verb, talking, r"must run equally often on all of them\. Got SyncBatchNorm\. Use BatchNorm"
    )
    hooked = DistributedDataParallel(nn.Linear(2, 1))
    hooked._register_fused_optim(torch.optim.SGD, lr=0.1)
    refused(
        verb,
        hooked,
        r"Got a .* with an optimizer in its backward pass\. Make it without that option\.",
    )


REFUSES = {
    verb.__name__: TWO.case(lambda rank, verb=verb: refuses(rank, verb), f"{verb.__name__} refuses")
    for verb in (vb.backward, vb.loss)
}


@pytest.mark.parametrize("verb", REFUSES)
def test_what_cannot_wait_for_the_end_of_a_window(verb):
    assert REFUSES[verb]() == [None, None]


@TWO.case
def each_by_itself(rank):
    module = nn.Linear(2, 1, bias=False).double()
    x = torch.full((4, 2), float(rank + 1), dtype=torch.float64)
    vb.backward(lambda x: module(x).mean(), x, module=module, microbatch_size=3, group=False)
    return module.weight.grad.numpy()


def test_ranks_that_train_apart_say_so():
    for rank, gradient in enumerate(each_by_itself()):
        assert_close(gradient, [[rank + 1.0] * 2])


@TWO.case
def certified(rank):
    net = DistributedDataParallel(network())
    with pytest.raises(ValueError, match=r"Got a DistributedDataParallel\. Pass the module inside"):
        vb.certify(mse_of(net), rows(0, 6), module=net, microbatch_size=2)
    if rank == 0:
        return vb.certify(
            mse_of(net.module), rows(0, 6), module=net.module, microbatch_size=2
        ).exact
    return True


def test_certify_compares_on_one_process():
    assert certified() == [True, True]
