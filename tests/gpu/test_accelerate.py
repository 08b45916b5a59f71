"""Accelerate in float16 on a CUDA device, where it has a scaler. Not measured yet."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from tests.accelerate.scripts import forget
from tests.masked_tokens import BATCH, CLIP, Net, data, flat, labels, loss_of
from torch.utils.data import DataLoader

import virtualbatch.torch as vb

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

FACTORS = (1.0, float("inf"), 1.0)


@pytest.fixture(autouse=True)
def _unused():
    yield
    forget()


def trained(size):
    """Three updates, the second of which overflows; uncut where size is None."""
    forget()
    scaling = GradScalerKwargs(init_scale=2.0**12, growth_interval=1000)
    accelerator = Accelerator(mixed_precision="fp16", kwargs_handlers=[scaling])
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), 0.5)
    model, optimizer, loader = accelerator.prepare(net, sgd, DataLoader(data(), BATCH))
    seen = []
    for factor, batch in zip(FACTORS, loader, strict=True):

        def loss_fn(batch, factor=factor):
            return loss_of(model)(batch) * factor

        before = flat(net)
        if size is None:
            loss = loss_fn(batch)
        else:
            loss = vb.loss(
                loss_fn,
                batch,
                module=model,
                microbatch_size=size,
                weight=labels,
                scaler=accelerator.scaler,
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        moved = not torch.equal(flat(net), before)
        seen.append((optimizer.step_was_skipped, moved, accelerator.scaler.get_scale()))
    return seen, flat(net).cpu()


def test_an_overflow_skips_one_update_and_halves_the_scale_once():
    found, weights = trained(3)
    assert found == [(False, True, 2.0**12), (True, False, 2.0**11), (False, True, 2.0**11)]
    due, whole = trained(None)
    assert found == due
    way = (whole - flat(Net())).norm()
    # A few roundings to the eleven bits of float16 on the way.
    assert (weights - whole).norm() <= 4 * 2.0**-10 * way
