"""Collectives of a window of fully sharded modules among 64 ranks, of which one process is one.

PyTorch's fake group answers at once and moves nothing, so what is counted is what is asked for.
"""

from collections import Counter

import pytest
import torch
from tests.torch.ranks import run
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import virtualbatch.torch as vb

GROUPS = 3
PARAMETERS_BYTES = 3 * (64 * 64 + 64) * 8
NAMES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "sum"}
# What agreement sends is smaller than an eighth of a layer.
SMALL = 64 * 64


class Tally(TorchDispatchMode):
    """Counts collectives by name, and their bytes; small sums are messages."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")
        if name[0] == "c10d":
            tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            size = max(x.nbytes for x in tensors)
            kind = NAMES[name[1]]
            if kind == "sum" and size < SMALL:
                kind = "message"
            self.found[kind] += 1
            self.bytes[kind] += size
        return result


def model(mesh, keeps):
    options = {"mesh": mesh, **({"reshard_after_forward": False} if keeps else {})}
    module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(GROUPS)]).double()
    for layer in module:
        fully_shard(layer, **options)
    fully_shard(module, **options)
    if keeps:
        module.set_reshard_after_backward(False)
    return module


def counted(rank, world):
    """(mesh, mode, micro-batches) -> collectives by kind, and bytes of what is scattered."""
    distributed.destroy_process_group()
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    replicas = init_device_mesh("cpu", (8, 8), mesh_dim_names=("replicate", "shard"))
    x = torch.ones(16, 64, dtype=torch.float64)
    found = {}
    for shape, mesh in (("64", None), ("8 x 8", replicas)):
        for mode in ("microbatch", "window", "kept gathered"):
            for count in (1, 4, 16):
                module = model(mesh, mode == "kept gathered")

                def window(module=module, mode=mode, count=count):
                    vb.backward(
                        lambda x: module(x).square().mean(),
                        x,
                        module=module,
                        accumulation_steps=count,
                        reduce="microbatch" if mode == "microbatch" else "window",
                    )

                window()
                module.zero_grad()
                with Tally() as tally:
                    window()
                found[shape, mode, count] = dict(tally.found), tally.bytes["scatter"]
    return found


@pytest.fixture(scope="module")
def found():
    return run(counted, 1)[0]


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize(
    ("mode", "gathers", "scatters"),
    [
        ("microbatch", lambda n: 2 * GROUPS * n, lambda n: GROUPS * n),
        ("window", lambda n: 2 * GROUPS * n, lambda n: GROUPS),
        ("kept gathered", lambda n: GROUPS, lambda n: GROUPS),
    ],
)
def test_collectives_by_the_number_of_micro_batches(found, mode, gathers, scatters, count):
    collectives, scattered = found["64", mode, count]
    # The number of micro-batches, weights, success, and the loss.
    assert collectives == {"gather": gathers(count), "scatter": scatters(count), "message": 3}
    assert scattered == PARAMETERS_BYTES * scatters(count) / GROUPS


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("mode", ["microbatch", "window", "kept gathered"])
def test_replicas_of_shards_sum_once(found, mode, count):
    collectives, _ = found["8 x 8", mode, count]
    assert collectives["sum"] == GROUPS
    assert collectives["message"] == 3
