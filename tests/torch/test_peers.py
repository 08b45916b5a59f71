"""Cases that other accumulation loops get wrong, with the figures that are due.

Most use one-hot samples and a step of size 1, so that what a weight moved by is the part of the
update that its sample or token received. The names are those of the survey of peers.
"""

import copy

import pytest
import torch
from tests.oracle import assert_close
from torch import nn
from torch.utils.data import DataLoader

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


def test_f1_every_token_counts_once():
    # Two micro-batches of 2 x 4 tokens, 7 valid and 1 valid. Peers give the lone token 4 times.
    model = OneHot(16)
    mask = torch.ones(4, 4, dtype=torch.float64)
    mask[1, 3] = mask[3, 0] = 0
    mask[2, :], mask[3, 1:] = 0, 0
    mask[2, 2] = 1

    def loss_fn(batch):
        return (model(batch["tokens"]) * batch["mask"]).sum() / batch["mask"].sum()

    moved = model.update(
        {"tokens": eye(16).reshape(4, 4, 16), "mask": mask},
        loss_fn,
        microbatch_size=2,
        weight=lambda batch: batch["mask"].sum(),
    )
    assert mask.sum() == 8
    assert_close(moved, mask.reshape(-1) * 0.125)


def test_f2_a_short_last_batch_is_an_update_of_its_own():
    # 10 samples by 4, two per window, two epochs: peers carry the short batch into the next epoch.
    model = OneHot(10)
    for _ in range(2):
        loader = DataLoader(eye(10), batch_size=4)
        moved = [model.update(window) for window in vb.windows(loader, accumulation_steps=2)]
        assert_close(moved[0], [1 / 8] * 8 + [0] * 2)
        assert_close(moved[1], [0] * 8 + [1 / 2] * 2)
    assert model.updates == 4


def test_f3_a_trailing_window_is_neither_dropped_nor_too_small():
    # 5 micro-batches, 4 per window. Peers never apply the fifth, or a quarter of it.
    model = OneHot(10)
    loader = DataLoader(eye(10), batch_size=2)
    moved = [model.update(window) for window in vb.windows(loader, accumulation_steps=4)]
    assert len(moved) == 2
    assert_close(moved[1], [0] * 8 + [1 / 2] * 2)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_f4_a_term_that_is_already_a_mean_counts_once(steps):
    # Squared error over 7 + 1 tokens, plus the mean of v squared: due is 1 for any cut.
    model = OneHot(8)
    model.extra = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    mask = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0]).reshape(4, 3).double()
    tokens = torch.randn(4, 3, 8).double()

    def loss_fn(batch):
        errors = (model(batch["tokens"]) - 1) ** 2
        return {
            "tokens": (errors * batch["mask"]).sum() / batch["mask"].sum(),
            "extra": model.extra.square().mean(),
        }

    moved = model.update(
        {"tokens": tokens, "mask": mask},
        loss_fn,
        accumulation_steps=steps,
        weight=lambda batch: {"tokens": batch["mask"].sum(), "extra": None},
    )
    assert_close(model.extra.grad, [1.0, -1.0])
    assert_close(moved, -2 * (tokens * mask[:, :, None]).sum((0, 1)) / mask.sum())


def test_f5_the_loss_is_not_times_the_micro_batches():
    assert_close(OneHot(8).update(eye(8), accumulation_steps=4), [1 / 8] * 8)


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


def test_r4_fewer_micro_batches_than_steps_are_no_smaller_update():
    assert_close(OneHot(3).update(eye(3), accumulation_steps=4), [1 / 3] * 3)


def test_r4_each_micro_batch_has_its_own_dropout_mask():
    layer = nn.Linear(64, 64)

    def loss_fn(rows):
        kept = nn.functional.dropout(rows, 0.5)
        return layer(kept).mean(), kept

    _, masks = vb.backward(
        loss_fn, torch.ones(4, 64), module=layer, microbatch_size=1, has_aux=True
    )
    assert len(masks.unique(dim=0)) == 4


def test_r9_a_field_with_fewer_rows_is_not_truncated():
    model = OneHot(2)
    for rows in (8, 2):
        with pytest.raises(ValueError, match="the same number of rows"):
            model.update({"x": torch.ones(4, 2), "y": torch.ones(rows)}, microbatch_size=2)


def test_r10_unequal_totals_of_sample_weights():
    model = OneHot(4)
    batch = {"x": eye(4), "w": torch.tensor([3.0, 3, 1, 1]).double()}

    def loss_fn(batch):
        return (model(batch["x"]) * batch["w"]).sum() / batch["w"].sum()

    moved = model.update(batch, loss_fn, microbatch_size=2, weight=lambda batch: batch["w"].sum())
    assert_close(moved, [0.375, 0.375, 0.125, 0.125])


def test_r10_two_outputs_with_two_masks():
    models = nn.ModuleDict({"first": OneHot(4), "second": OneHot(4)})
    masks = {"first": [1.0, 0, 1, 1], "second": [1.0, 1, 1, 0]}
    batch = {"x": eye(4)} | {name: torch.tensor(mask).double() for name, mask in masks.items()}

    def loss_fn(batch):
        return {
            name: (model(batch["x"]) * batch[name]).sum() / batch[name].sum()
            for name, model in models.items()
        }

    vb.backward(
        loss_fn,
        batch,
        module=models,
        microbatch_size=2,
        weight=lambda batch: {name: batch[name].sum() for name in models},
    )
    for name, mask in masks.items():
        assert_close(models[name].weight.grad, torch.tensor(mask) / 3, 1e-7)


def test_a_virtual_batch_that_the_micro_batch_does_not_divide():
    # 650 samples in updates of 130 by micro-batches of 32: peers give the last two 13 times as
    # much, or drop the last ten.
    model = OneHot(650)
    for start in range(0, 650, 130):
        moved = model.update(eye(650)[start : start + 130], microbatch_size=32)
        assert_close(moved[start : start + 130], [1 / 130] * 130)
    assert_close(-model.weight.detach(), [1 / 130] * 650)
    assert model.updates == 5
