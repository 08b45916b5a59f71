"""Loops that people copy, with the line changed: nanoGPT's, timm's and torchtune's.

The oracle is the same loop on whole batches. Beside it stands what the loop itself accumulates.
"""

import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import virtualbatch.torch as vb

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, LENGTH, ROWS, PIECES, UPDATES = 40, 8, 20, 5, 5
WRONG = 0.1
# It divides by the root of a square, so where a gradient is near 0 it magnifies rounding.
ADAM = 1e-9


class Block(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.attend(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class GPT(nn.Module):
    """Its table of words is its head as well, and it returns logits and loss as nanoGPT does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(LENGTH, 16)
        self.block, self.norm = Block(), nn.LayerNorm(16)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids, targets):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        logits = self.head(self.norm(self.block(x)))
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def batches(rows=ROWS):
    made = torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        x, y = (torch.randint(0, WORDS, (rows, LENGTH), generator=made) for _ in range(2))
        counts = torch.rand(rows, LENGTH, generator=made) < torch.rand(rows, 1, generator=made)
        counts[:, 0] = True
        yield x, torch.where(counts, y, -1)


def pieces(x, y):
    return list(zip(x.chunk(PIECES), y.chunk(PIECES), strict=True))


def window_loss(model, x, y, **options):
    """The line that replaces a forward pass, or the loop over micro-batches."""
    return vb.loss(
        lambda batch: model(*batch)[1],
        (x, y),
        module=model,
        weight=lambda batch: (batch[1] != -1).sum(),
        microbatch_size=3,
        **options,
    )


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def error(found, due):
    """The largest difference of a weight, in units of the largest way that one went."""
    start = flat(GPT())
    return float((found - due).abs().max() / (due - start).abs().max())


def nanogpt(way, fp16=False):
    """Cosine by hand, GradScaler, clipping, AdamW; the loss as it is logged."""
    model = GPT() if fp16 else GPT().double()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=2.0**12)
    losses, norms = [], []
    for number, (x, y) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * number / UPDATES))
        cut = pieces(x, y) if way == "own" else [(x, y)]
        for piece in cut:
            with torch.autocast("cpu", torch.float16, enabled=fp16):
                if way == "ours":
                    loss = window_loss(model, *piece, scaler=scaler)
                else:
                    loss = model(*piece)[1] / len(cut)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * len(cut))
    return flat(model), losses, norms


@cache
def nanogpt_whole():
    return nanogpt("whole")


def test_nanogpt_with_masked_targets():
    due, due_losses, due_norms = nanogpt_whole()
    weights, losses, norms = nanogpt("ours")
    assert error(weights, due) <= ADAM
    torch.testing.assert_close(losses, due_losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(norms, due_norms, rtol=1e-10, atol=0)
    own, own_losses, own_norms = nanogpt("own")
    assert error(own, due) > WRONG
    # It logs its last micro-batch's, times their number.
    for found, of_all in ((own_losses, due_losses), (own_norms, due_norms)):
        assert max(abs(a - b) for a, b in zip(found, of_all, strict=True)) > WRONG


def test_nanogpt_in_float16_with_its_scaler():
    """No further from float64 than the whole batch in float16 is."""
    due = nanogpt_whole()[0]

    def distance(way):
        return float((nanogpt(way, fp16=True)[0] - due).norm() / (due - flat(GPT())).norm())

    whole = distance("whole")
    assert 1e-4 < distance("ours") <= 1.2 * whole
    assert distance("own") > WRONG > whole


class NativeScaler:
    """A scaler that is called with the loss, and makes the update, as timm has it."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def __call__(self, loss, optimizer, clip_grad, parameters, need_update=True):
        self.scaler.scale(loss).backward(create_graph=False)
        if need_update:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad)
            self.scaler.step(optimizer)
            self.scaler.update()


def timm(way):
    model = GPT().double()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.05)
    loss_scaler = NativeScaler()
    # The last micro-batch is short.
    for x, y in batches(rows=23):
        optimizer.zero_grad()
        cut = pieces(x, y) if way == "own" else [(x, y)]
        for number, piece in enumerate(cut, 1):
            if way == "ours":
                loss = window_loss(model, *piece, scaler=loss_scaler.scaler)
            else:
                loss = model(*piece)[1] / len(cut)
            loss_scaler(
                loss,
                optimizer,
                clip_grad=1.0,
                parameters=model.parameters(),
                need_update=number == len(cut),
            )
    return flat(model)


def test_a_scaler_that_is_called_with_the_loss():
    due = timm("whole")
    assert error(timm("ours"), due) <= ADAM
    assert error(timm("own"), due) > WRONG


def in_backward(way):
    """Each parameter has an optimizer that steps when its gradient is there, as torchtune's do."""
    model = GPT().double()
    optimizers = {p: torch.optim.AdamW([p], 0.01) for p in model.parameters()}
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, 0.9) for each in optimizers.values()]
    steps = []

    def step(parameter):
        steps.append(parameter)
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for x, y in batches():
        for piece in pieces(x, y) if way == "own" else [(x, y)]:
            loss = window_loss(model, *piece) if way == "ours" else model(*piece)[1]
            loss.backward()
        for schedule in schedules:
            schedule.step()
    return flat(model), len(steps) / len(optimizers)


def test_an_optimizer_in_the_backward_pass():
    """It steps once a window, also that of the table that is a head; else once a micro-batch."""
    due, updates = in_backward("whole")
    assert updates == UPDATES
    found, updates = in_backward("ours")
    assert updates == UPDATES
    assert error(found, due) <= ADAM
    own, updates = in_backward("own")
    assert updates == UPDATES * PIECES
    assert error(own, due) > WRONG


@pytest.mark.parametrize("way", ["whole", "own"])
def test_a_sum_that_is_divided_at_the_end_is_right_already(way):
    """What torchtune's recipe on one device does; a window of it is the same."""

    def gradients(ours):
        model, (x, y) = GPT().double(), next(batches())
        total = (y != -1).sum()
        for piece in pieces(x, y) if way == "own" else [(x, y)]:
            count = (piece[1] != -1).sum()
            (window_loss(model, *piece) if ours else model(*piece)[1]).mul(count).backward()
        return torch.cat([(p.grad / total).flatten() for p in model.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-10, atol=1e-14)
