"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers; the cases
that every engine has stand in tests/conformance.
"""

import copy

import pytest
import torch
from tests.oracle import assert_close
from torch import nn

import virtualbatch.torch as vb


def eye(rows):
    return torch.eye(rows, dtype=torch.float64)


class OneHot(nn.Module):
    """A linear model in which sample i moves weight i alone."""

    def __init__(self, samples, optimizer=torch.optim.SGD, rate=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        self.optimizer = optimizer([self.weight], lr=rate)
        self.updates = 0

    def forward(self, rows):
        return rows @ self.weight

    def update(self, batch, loss_fn=None, **options):
        """One update; what each weight moved by."""
        before = self.weight.detach().clone()
        self.optimizer.zero_grad()
        vb.backward(loss_fn or (lambda rows: self(rows).mean()), batch, module=self, **options)
        self.optimizer.step()
        self.updates += 1
        return before - self.weight.detach()


def test_f6_a_schedule_counts_updates():
    # Rate 1 for two updates, then 0. Peers read the schedule at 3, 7, 11 and never move.
    model = OneHot(1)
    schedule = torch.optim.lr_scheduler.LambdaLR(model.optimizer, lambda update: update < 2)
    moved = []
    for _ in range(4):
        moved.append(float(model.update(torch.ones(4, 1).double(), accumulation_steps=4)[0]))
        schedule.step()
    assert moved == [1.0, 1.0, 0.0, 0.0]


def test_f7_an_average_of_weights_moves_once_per_update():
    # Momentum 0.9, gradient 1, rate 1: due is -1.29 after three updates, not -1.5095.
    model = OneHot(1)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    for _ in range(3):
        model.update(torch.ones(4, 1).double(), accumulation_steps=4)
        average.update_parameters(model)
    assert_close(average.module.weight.detach(), [-1.29])


def test_f7_every_micro_batch_of_a_window_sees_the_same_weights():
    model = OneHot(1)
    seen = []

    def loss_fn(rows):
        seen.append(float(model.weight.detach()[0]))
        return model(rows).mean()

    for _ in range(3):
        model.update(torch.ones(4, 1).double(), loss_fn, accumulation_steps=4)
    assert seen == [0.0] * 4 + [-1.0] * 4 + [-2.0] * 4


def test_f9_one_nan_spoils_its_own_window_only():
    model = OneHot(1)

    def guarded(window):
        before = copy.deepcopy(model.weight.data)
        moved = model.update(window)
        if not moved.isfinite().all():
            model.weight.data = before
        return float(before[0] - model.weight.detach()[0])

    stream = [torch.full((1, 1), value).double() for value in (1.0, torch.nan, 1.0, 1.0, 1.0, 1.0)]
    assert [guarded(window) for window in vb.windows(stream, accumulation_steps=2)] == [0, 1, 1]


def test_f10_a_stateful_optimizer_is_fed_once_per_window():
    batch = torch.randn(8, 3).double()
    cut, whole = (OneHot(3, torch.optim.Adam, 0.1) for _ in range(2))
    for _ in range(3):
        cut.update(batch, accumulation_steps=4)
        whole.update(batch, microbatch_size=8)
    assert cut.optimizer.state[cut.weight]["step"] == 3
    assert_close(cut.weight.detach(), whole.weight.detach(), 1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("ids", "due"),
    [
        ([[[0]], [[0], [1]]], [2 / 3, 1 / 3]),
        ([[[0, 0]], [[0, 1]]], [0.75, 0.25]),
        ([[[0, 0]], [[1, 1]]], [0.5, 0.5]),
    ],
    ids=["again", "repeated", "apart"],
)
def test_f10_rows_of_an_embedding_are_neither_doubled_nor_lost(ids, due, sparse):
    table = nn.Embedding(3, 1, sparse=sparse, dtype=torch.float64)
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.SGD(table.parameters(), 1.0)
    window = vb.Window(torch.tensor(microbatch) for microbatch in ids)
    vb.backward(lambda ids: table(ids).mean(), window, module=table)
    optimizer.step()
    assert_close(table.weight.detach()[:, 0], [-due[0], -due[1], 0.0])


def test_a_virtual_batch_that_the_micro_batch_does_not_divide():
    # 650 samples in updates of 130 by micro-batches of 32: peers give the last two 13 times as
    # much, or drop the last ten.
    model = OneHot(650)
    for start in range(0, 650, 130):
        moved = model.update(eye(650)[start : start + 130], microbatch_size=32)
        assert_close(moved[start : start + 130], [1 / 130] * 130)
    assert_close(-model.weight.detach(), [1 / 130] * 650)
    assert model.updates == 5
