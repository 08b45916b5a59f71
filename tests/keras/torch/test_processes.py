"""Several processes, DDP and FSDP are refused on PyTorch by every verb; one process is not."""

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import virtualbatch.keras as vb

BATCH = np.ones((6, 2)), np.ones((6, 1))
VERBS = {
    "accumulate": lambda model: vb.accumulate(model, microbatch_size=2),
    "plan": lambda model: vb.plan(model, BATCH),
    "certify": lambda model: vb.certify(model, BATCH, microbatch_size=2),
}


@pytest.fixture(autouse=True)
def _one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled_model(*inner):
    model = keras.Sequential([keras.Input((2,)), *inner, layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("verb", VERBS)
def test_one_of_several_processes(verb, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    text = r"accumulate trains one process\. Got a process group of 2 ranks\. Wrap "
    with pytest.raises(NotImplementedError, match=text):
        VERBS[verb](compiled_model())


def test_processes_that_start_after_accumulate(monkeypatch):
    model = compiled_model()
    vb.accumulate(model, microbatch_size=2)
    model.fit(*BATCH, batch_size=6, verbose=0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match=r"accumulate trains one process"):
        model.fit(*BATCH, batch_size=6, verbose=0)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_layer_that_wraps_a_sharded_module(verb):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2).double())
    model = compiled_model(layers.TorchModuleWrapper(module))
    fully_shard(module[0], mesh=init_device_mesh("cpu", (1,)))
    text = r"accumulate trains one process\. Got a FSDPLinear in the model\. "
    with pytest.raises(NotImplementedError, match=text):
        VERBS[verb](model)
