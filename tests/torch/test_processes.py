"""Several processes, DDP and FSDP are refused by every verb; a group of one process is not."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import virtualbatch.torch as vb

X = torch.ones(6, 2)
VERBS = {
    "backward": lambda *given, **more: vb.backward(*given, **more, microbatch_size=2),
    "plan": vb.plan,
    "certify": lambda *given, **more: vb.certify(*given, **more, microbatch_size=2),
}


@pytest.fixture
def _one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def refused(verb, module, text):
    """Checks that a verb refuses, before the loss function is called."""
    calls = []
    with pytest.raises(NotImplementedError, match=text):
        VERBS[verb](calls.append, X, module=module)
    assert not calls
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.usefixtures("_one_process")
def test_a_group_of_one_process_changes_nothing():
    ours = nn.Linear(2, 1)
    alone = copy.deepcopy(ours)
    ours(X).square().mean().backward()
    vb.backward(lambda x: alone(x).square().mean(), X, module=alone, microbatch_size=6)
    assert torch.equal(ours.weight.grad, alone.weight.grad)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("verb", VERBS)
def test_one_of_several_processes(verb, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    text = r"work of one process.* Got a torch\.distributed process group of 2 processes\. Train in"
    refused(verb, nn.Linear(2, 1), text)
    # Nor does what DDP wraps help.
    refused(verb, nn.parallel.DistributedDataParallel(nn.Linear(2, 1)).module, text)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("verb", VERBS)
def test_distributed_data_parallel(verb):
    module = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(2, 1)))
    refused(verb, module, r"DistributedDataParallel is not supported by this version.* Train on")


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("verb", VERBS)
def test_fully_sharded(verb):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    fully_shard(module[0], mesh=init_device_mesh("cpu", (1,)))
    refused(verb, module, r"FSDP is not supported by this version.* Got module of type FSDPLinear")


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*FSDP.*:UserWarning")
def test_fully_sharded_of_the_first_kind():
    module = FullyShardedDataParallel(nn.Linear(2, 1), device_id=torch.device("cpu"))
    refused("backward", module, r"FSDP is not .* Got module of type FullyShardedDataParallel\.")


PROCESS = """
    import sys, torch, virtualbatch.torch as vb
    from datetime import timedelta
    torch.distributed.init_process_group(
        "gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2,
        timeout=timedelta(seconds=60),
    )
    module = torch.nn.Linear(2, 1)
    try:
        vb.backward(lambda x: module(x).mean(), torch.ones(4, 2), module=module, microbatch_size=2)
    except NotImplementedError as error:
        print(error)
    torch.distributed.destroy_process_group()
"""


@pytest.mark.thorough("two processes; the rule itself is tried in one")
def test_two_real_processes(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), tmp_path / "store", str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            assert "process group of 2 processes" in process.communicate(timeout=120)[0]
    finally:
        for process in running:
            process.kill()
