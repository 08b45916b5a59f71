"""Losses that are not finite, where PyTorch differs: devices that nobody waits for, evaluations."""

import math

import pytest
import torch

import virtualbatch.torch as vb
from virtualbatch.torch import _not_finite
from virtualbatch.torch._not_finite import Heard, ModuleLosses

ROWS = 10


def window(losses, before=None):
    """What is told of a window of one term."""
    scalars = [torch.tensor(loss) for loss in losses]
    before = None if before is None else torch.tensor(before)
    parts = [(index, "loss", loss) for index, loss in enumerate(scalars)]
    return Heard(sum(scalars), parts, [4] * len(losses), before=before)


class Device:
    """Scalars that are sent, and are there when `done` says so."""

    def __init__(self, monkeypatch):
        self.done = 0
        self.sent = 0
        monkeypatch.setattr(_not_finite, "_is_on_host", lambda total: False)
        send = _not_finite._sent

        def sent(found):
            self.sent += 1
            return send(found)._replace(event=_Event(self, self.sent))

        monkeypatch.setattr(_not_finite, "_sent", sent)


class _Event:
    def __init__(self, device, number):
        self._device, self._number = device, number

    def query(self):
        return self._device.done >= self._number


@pytest.fixture
def said(caplog):
    return lambda: [x for x in caplog.messages if "not_finite.md" in x]


def test_a_device_is_heard_of_when_it_is_done(monkeypatch, said):
    device, losses = Device(monkeypatch), ModuleLosses()
    losses.take(window([1.0, math.nan, 2.0]))
    losses.take(window([1.0, 1.0]))
    assert said() == []
    device.done = 2
    losses.take(window([math.inf, math.nan]))
    (message,) = said()
    assert message.startswith("The loss is nan in micro-batch 2 of 3 of window 1 (rows 4 to 7 of")
    device.done = 3
    losses.take(window([1.0]))
    assert "in each of 2 micro-batches of window 3" in said()[1]


def test_without_events_the_next_window_is_waited_for(monkeypatch, said):
    monkeypatch.setattr(_not_finite, "_is_on_host", lambda total: False)
    losses = ModuleLosses()
    losses.take(window([1.0, math.nan]))
    assert said() == []
    losses.take(window([1.0]))
    assert len(said()) == 1


def test_what_no_loss_can_be_told_from_is_left_out(said):
    losses = ModuleLosses()
    losses.take(window([math.nan], before=math.nan))
    assert said() == []
    losses.take(window([math.nan], before=1.0))
    assert "in window 1" in said()[0]


def test_an_evaluation_is_no_update(said):
    model, batch = torch.nn.Linear(2, 1), torch.full((ROWS, 2), math.nan)
    with torch.no_grad():
        vb.loss(lambda x: model(x).mean(), batch, module=model, microbatch_size=4)
    assert said() == []


def test_a_part_of_a_larger_tensor_is_not_kept_with_it(monkeypatch):
    taken = []
    monkeypatch.setattr(ModuleLosses, "take", lambda self, found: taken.append(found))
    model = torch.nn.Linear(2, 1)

    def loss_fn(x):
        return (model(x).sum() * torch.ones(1000))[0]

    vb.backward(loss_fn, torch.ones(ROWS, 2), module=model, microbatch_size=5, weight="sum")
    assert [x.untyped_storage().nbytes() for _, _, x in taken[0].parts] == [4, 4]
