"""Preferences, groups and temperatures: by rows where they can be, by `rowwise` where not."""

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.coupled import network, rows, taken
from torch import nn
from torch.nn import functional as F

import virtualbatch.torch as vb

WORDS, PROMPTS, GROUP = 9, 3, 4


class Policy(nn.Module):
    """Log-probabilities of the words of a text, each after those before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(WORDS, 5).double()
        self.head = nn.Linear(5, WORDS).double()

    def forward(self, text):
        hidden = torch.tanh(self.embedding(text[:, :-1]).cumsum(1))
        each = self.head(hidden).log_softmax(-1)
        return each.gather(-1, text[:, 1:, None]).squeeze(-1)


def texts(count, length):
    torch.manual_seed(6)
    return torch.randint(0, WORDS, (count, length))


def test_a_pair_of_preferences_is_a_row():
    policy, reference = Policy(), Policy().requires_grad_(False)
    pairs = {"chosen": texts(11, 4), "rejected": texts(11, 6)}

    def margins(pairs):
        chosen, rejected = (
            policy(text).sum(1) - 0.9 * reference(text).sum(1) for text in pairs.values()
        )
        return chosen - rejected

    def loss_fn(pairs):
        return -F.logsigmoid(0.5 * margins(pairs)).mean()

    loss_fn(pairs).backward()
    due = taken(policy)
    vb.backward(loss_fn, pairs, module=policy, microbatch_size=4)
    assert_all_close(taken(policy), due)
    encode = vb.rowwise(margins, module=[policy, reference], microbatch_size=4)
    (-F.logsigmoid(0.5 * encode(pairs)).mean()).backward()
    assert_all_close(taken(policy), due)


def groups():
    """Completions of some prompts, the words that count, and rewards."""
    text = texts(PROMPTS * GROUP, 6)
    counted = torch.arange(5) < 1 + torch.arange(PROMPTS * GROUP)[:, None] % 5
    return {"text": text, "counted": counted.double(), "reward": rows(PROMPTS * GROUP)[:, 0]}


def whitened(x):
    x = x.reshape(PROMPTS, GROUP)
    return ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)).flatten()


@pytest.mark.parametrize("size", [3, 5])
def test_advantages_that_are_data_leave_completions_free_of_their_groups(size):
    policy, batch = Policy(), groups()
    batch["advantage"] = whitened(batch.pop("reward"))

    def loss_fn(batch):
        each = policy(batch["text"]) * batch["advantage"][:, None]
        return -(each * batch["counted"]).sum() / batch["counted"].sum()

    loss_fn(batch).backward()
    due = taken(policy)
    options = {"module": policy, "microbatch_size": size}
    vb.backward(loss_fn, batch, weight=lambda batch: batch["counted"].sum(), **options)
    assert_all_close(taken(policy), due)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_groups_that_are_normalised_in_the_loss_may_be_larger_than_a_micro_batch(size):
    policy, batch = Policy(), groups()

    def scores(batch):
        return (policy(batch["text"]) * batch["counted"]).sum(1)

    def loss(scores):
        # Listwise within a group, and against the whitened scores of it.
        listwise = -scores.reshape(PROMPTS, GROUP).log_softmax(1)[:, 0].mean()
        return listwise - (whitened(scores) * batch["reward"]).mean()

    loss(scores(batch)).backward()
    due = taken(policy)
    loss(vb.rowwise(scores, module=policy, microbatch_size=size)(batch)).backward()
    assert_all_close(taken(policy), due)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_a_temperature_is_counted_once_however_many_micro_batches_there_are(size):
    module, x = network(), rows(12)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    encode = vb.rowwise(module, microbatch_size=size)

    def loss(z):
        return F.cross_entropy(temperature.exp() * z @ z.roll(1, 0).T, torch.arange(len(z)))

    loss(module(x)).backward()
    due = temperature.grad.item()
    temperature.grad = None
    loss(encode(x)).backward()
    assert temperature.grad.item() / due == pytest.approx(1.0, abs=1e-12)
