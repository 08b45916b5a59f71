"""The first window of a loss proves itself on a CUDA device, whose kernels round otherwise."""

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.proves_itself


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).cuda()


class Recurrent(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.rnn = nn.LSTM(16, 32, num_layers=2, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def squares(model):
    return lambda x: (model(x) ** 2).mean()


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_no_false_alarm_of_matrix_products(tf32, autocast, caplog, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    model = mlp()
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        vb.backward(squares(model), torch.randn(64, 64), module=model, microbatch_size=16)
    assert not caplog.records


def test_no_false_alarm_of_convolutions(caplog, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 4)]
    model = nn.Sequential(*layers).cuda()
    vb.backward(squares(model), torch.randn(32, 3, 16, 16), module=model, microbatch_size=8)
    assert not caplog.records


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recurrent_layers_run_in_training_mode(dropout):
    model = Recurrent(dropout).cuda()
    state = torch.cuda.get_rng_state()
    vb.backward(
        squares(model), torch.randn(16, 5, 16), module=model, microbatch_size=4, check=False
    )
    drawn = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(state)
    vb.backward(squares(model), torch.randn(16, 5, 16), module=model, microbatch_size=4)
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


def test_captured_losses_are_tried_as_they_are_written():
    model = mlp()
    loss_fn = vb.captured(lambda x: (model(x) ** 2).sum())
    with pytest.raises(ValueError, match="sum_loss"):
        vb.backward(loss_fn, torch.randn(64, 64).cuda(), module=model, microbatch_size=16)
