"""Losses that couple rows, on a CUDA device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import virtualbatch.torch as vb

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

ROWS, SIZE = 48, 7


def encoder(dtype=torch.float64, dropout=0.0, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(12, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 8)]
    return nn.Sequential(*layers).to("cuda", dtype)


def contrast(z, w):
    logits = 5 * F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def gradients(model, encode, views, scaler=None):
    model.zero_grad()
    torch.manual_seed(1)
    loss = contrast(*map(encode, views))
    (loss if scaler is None else scaler.scale(loss)).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_close(found, due, tolerance):
    largest = max(x.abs().max() for x in due)
    for a, b in zip(found, due, strict=True):
        assert (a - b).abs().max() <= tolerance * largest


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_equals_the_uncut_batch(device):
    model, views = encoder(), torch.randn(2, ROWS, 12, dtype=torch.float64)
    due = gradients(model, model, views.to("cuda"))
    encode = vb.rowwise(model, microbatch_size=SIZE)
    assert_close(gradients(model, encode, views.to(device)), due, 1e-12)


def test_the_device_draws_the_same_masks_twice():
    model, views = encoder(dropout=0.3), torch.randn(2, ROWS, 12, device="cuda").double()
    encode = vb.rowwise(model, microbatch_size=ROWS // 4)

    def in_one_graph(view):
        return torch.cat([model(piece) for piece in view.split(ROWS // 4)])

    due = gradients(model, in_one_graph, views)
    after = torch.cuda.get_rng_state()
    assert_close(gradients(model, encode, views), due, 1e-12)
    assert torch.equal(torch.cuda.get_rng_state(), after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_scaler(dtype):
    model, views = encoder(torch.float32), torch.randn(2, ROWS, 12, device="cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    encode = vb.rowwise(model, microbatch_size=ROWS // 4)

    def in_one_graph(view):
        return torch.cat([model(piece) for piece in view.split(ROWS // 4)])

    with torch.autocast("cuda", dtype=dtype, cache_enabled=False):
        due = gradients(model, in_one_graph, views, scaler)
        found = gradients(model, encode, views, scaler)
    assert_close(found, due, 4 * torch.finfo(dtype).eps)


def test_the_peak_does_not_grow_with_the_batch():
    model = encoder(torch.float32, width=4096)
    peaks = []
    for count in (4, 64):
        views = torch.randn(2, 64 * count, 12)
        gradients(model, vb.rowwise(model, microbatch_size=64), views[:, :64])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(model, vb.rowwise(model, microbatch_size=64), views)
        logits = 6 * (64 * count) ** 2 * 4
        peaks.append(torch.cuda.max_memory_allocated() - before - logits)
    assert peaks[1] <= 1.1 * peaks[0]
