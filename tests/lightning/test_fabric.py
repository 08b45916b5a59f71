"""Fabric: a loop of one's own in which `fabric.backward` gets the loss of a window."""

import os

import pytest
import torch
from lightning.fabric import Fabric
from tests.masked_tokens import (
    BATCH,
    CLIP,
    EPOCHS,
    ROWS,
    WRONG,
    Net,
    Trained,
    assert_whole,
    assert_wrong,
    data,
    flat,
    labels,
    loss_of,
    optimizer_and_schedule,
    whole_batches,
)
from tests.torch.ranks import Cases
from torch import distributed
from torch.utils.data import DataLoader

import virtualbatch.torch as vb

pytestmark = pytest.mark.usefixtures("one_thread")

TWO = Cases(2, limit=60)


class Loop:
    """What a script sets up, and the lines that follow its forward pass."""

    def __init__(self, batch_size=BATCH, rows=ROWS, dtype=torch.float64, **options):
        self.fabric = Fabric(accelerator="cpu", **options)
        self.fabric.launch()
        model = Net().to(dtype)
        optimizer, self.schedule = optimizer_and_schedule(model)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.loader = DataLoader(data(rows), batch_size)
        self.norms, self.losses = [], []

    def update(self, loss):
        self.fabric.backward(loss)
        self.step(loss)

    def step(self, loss):
        norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIP)
        self.norms.append(float(norm))
        self.losses.append(loss.item())
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def loss(self, batch, **options):
        return vb.loss(loss_of(self.model), batch, module=self.model, weight=labels, **options)

    def trained(self):
        rate = self.schedule.get_last_lr()[0]
        return Trained(flat(self.model), self.norms, self.losses, rate)


def own_rows(batch):
    """This rank's half."""
    size = len(batch[0]) // 2
    start = size * distributed.get_rank()
    return [leaf[start : start + size] for leaf in batch]


def usual(steps, part=list, **options):
    """Fabric's own way: no reduction but in the last micro-batch, and a mean of means."""
    loop = Loop(**options)
    for _ in range(EPOCHS):
        for batch in loop.loader:
            cut = list(zip(*(leaf.chunk(steps) for leaf in part(batch)), strict=True))
            for number, piece in enumerate(cut, 1):
                with loop.fabric.no_backward_sync(loop.model, enabled=number < len(cut)):
                    loss = loss_of(loop.model)(piece) / len(cut)
                    loop.fabric.backward(loss)
            loop.step(loss * len(cut))
    return loop.trained()


def ours(size, part=list, **options):
    loop = Loop(**options)
    for _ in range(EPOCHS):
        for batch in loop.loader:
            loop.update(loop.loss(part(batch), microbatch_size=size))
    return loop.trained()


def by_backward_fn(size, part=list, **options):
    """`backward`, whose micro-batches call Fabric's backward pass each."""
    loop = Loop(**options)
    for _ in range(EPOCHS):
        for batch in loop.loader:
            loss = vb.backward(
                loss_of(loop.model),
                part(batch),
                module=loop.model,
                microbatch_size=size,
                weight=labels,
                backward_fn=loop.fabric.backward,
            )
            loop.step(loss)
    return loop.trained()


def windows(**options):
    """A loader that Fabric has set up, of micro-batches."""
    loop = Loop(batch_size=4, **options)
    loader = loop.fabric.setup_dataloaders(loop.loader)
    for _ in range(EPOCHS):
        for window in vb.windows(loader, 5):
            loop.update(loop.loss(window))
    return loop.trained()


WAYS = {
    "cut by 3": lambda: ours(3),
    "cut by 7": lambda: ours(7),
    "a loader of micro-batches": windows,
    "backward_fn": lambda: by_backward_fn(3),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_norms_losses_and_schedule_are_those_of_whole_batches(way):
    assert_whole(WAYS[way]())
    assert_wrong(usual(5))


@pytest.fixture(autouse=True)
def _float32():
    """Mixed precision converts what comes out of it to the default dtype; nets have their own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


MIXED = {"precision": "bf16-mixed", "dtype": torch.float32}


def distance(found, rows=ROWS):
    due = whole_batches(rows).weights
    return float((found.weights - due).norm() / (due - flat(Net().double())).norm())


def in_autocast(size, **options):
    """The module that Fabric wrapped, in the context that the wrapper would open."""
    loop = Loop(**options)

    def loss_fn(batch):
        with loop.fabric.autocast():
            return loss_of(lambda ids: loop.model.module(ids).float())(batch)

    for _ in range(EPOCHS):
        for batch in loop.loader:
            inner = {"module": loop.model.module, "microbatch_size": size, "weight": labels}
            loop.update(vb.loss(loss_fn, batch, **inner))
    return loop.trained()


@pytest.mark.parametrize("way", [by_backward_fn, in_autocast])
def test_bfloat16_rounds_no_more_than_the_whole_batch_does(way):
    whole = distance(usual(1, **MIXED))
    assert 1e-4 < distance(way(3, **MIXED)) <= 1.2 * whole
    assert distance(usual(5, **MIXED)) > WRONG > whole


def test_a_mixed_precision_asks_for_a_backward_pass_of_its_own():
    """So there `loss` through the wrapper is refused, by Fabric itself."""
    loop = Loop(**MIXED)
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward\(loss\)`"):
        loop.loss(next(iter(loop.loader)), microbatch_size=3)
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def case(fn):
    """A case in which Fabric finds what `fabric run` sets."""

    def launched(rank):
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GROUP_RANK": 0}
        found |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        os.environ.update({name: str(value) for name, value in found.items()})
        return fn(devices=2, strategy="ddp")

    return TWO.case(launched, fn.__name__)


@case
def ours_on_two(**options):
    return ours(3, own_rows, **options)


@case
def mixed_on_two(**options):
    return by_backward_fn(3, own_rows, **options, **MIXED)


@case
def usual_on_two(**options):
    return usual(5, own_rows, **options)


def test_two_ranks_train_on_the_rows_of_both():
    first, second = ours_on_two()
    assert_whole(first)
    assert_whole(second)
    assert torch.equal(first.weights, second.weights)
    assert_wrong(usual_on_two()[0])


def test_two_ranks_in_bfloat16():
    first, second = mixed_on_two()
    assert 1e-4 < distance(first) <= 1.2 * distance(usual(1, **MIXED))
    assert torch.equal(first.weights, second.weights)
