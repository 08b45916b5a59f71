"""One rank of a group on NCCL, which sends nothing that is on the host: it starts, and is exact."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True, params=["nccl", "cpu:gloo,cuda:nccl"])
def group(request):
    torch.distributed.init_process_group(
        request.param, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 64), nn.BatchNorm1d(64).eval(), nn.ReLU(), nn.Linear(64, 4)]
    return nn.Sequential(*layers).double().cuda()


def masked(module):
    def loss_fn(batch):
        errors = module(batch["x"]).square().mean(1)
        return (errors * batch["mask"]).sum() / batch["mask"].sum()

    return loss_fn


def batch(rows=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    return {"x": x.cuda(), "mask": (torch.arange(rows) % 3 > 0).double().cuda()}


def options(module):
    return {"module": module, "microbatch_size": 5, "weight": lambda batch: batch["mask"].sum()}


def assert_uncut(module, plain, loss):
    due = masked(plain)(batch())
    due.backward()
    torch.testing.assert_close(loss.detach(), due.detach(), rtol=1e-12, atol=0)
    for found, reference in zip(module.parameters(), plain.parameters(), strict=True):
        gradient = found.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, reference.grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("reduce", ["window", "overlapped"])
@pytest.mark.parametrize("bucket_view", [False, True])
def test_distributed_data_parallel(reduce, bucket_view):
    plain = network()
    module = DistributedDataParallel(
        copy.deepcopy(plain), device_ids=[0], gradient_as_bucket_view=bucket_view
    )
    for _ in range(3):
        module.zero_grad()
        loss = vb.backward(masked(module), batch(), reduce=reduce, **options(module))
    assert_uncut(module, plain, loss)


def test_loss_behind_one_node():
    plain = network()
    module = DistributedDataParallel(copy.deepcopy(plain), device_ids=[0])
    loss = vb.loss(masked(module), batch(), **options(module))
    loss.backward()
    assert_uncut(module, plain, loss)


@pytest.mark.parametrize("reduce", ["microbatch", "window"])
def test_fully_sharded(reduce):
    plain = network()
    module = copy.deepcopy(plain)
    mesh = init_device_mesh("cuda", (1,))
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    loss = vb.backward(masked(module), batch(), reduce=reduce, **options(module))
    assert_uncut(module, plain, loss)
