"""The first window of a loss proves itself: what is refused, what is not, and what it leaves."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.oracle import assert_all_close, assert_close
from tests.tiers import tiered
from tests.torch.certify_models import CORRECT, WRONG
from torch import nn

import virtualbatch.torch as vb
from virtualbatch.torch._batch import read
from virtualbatch.torch._certify.found_weight import found_weight
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._window import Program

pytestmark = pytest.mark.proves_itself

# Those of certify's wrong steps that more than eight rows, or half precision, are needed to show,
# or that are no fault of the loss.
UNSEEN = {
    "counted in bfloat16",
    "batch norm",
    "spectral norm",
    "NaN in the data",
    "NaN in the weights",
    "logarithm",
}
FAULTS = [name for name in WRONG if name not in UNSEEN]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def first_window(step, size=4, **options):
    known = {name: step[name] for name in ("weight", "has_aux") if name in step}
    options = {"microbatch_size": size} | known | options
    return vb.backward(step["loss_fn"], step["batch"], module=step["module"], **options)


def linear(*sizes):
    return nn.Linear(*(sizes or (2, 1)), dtype=torch.float64)


def rows(count, *shape):
    return torch.randn(count, *(shape or (2,)), dtype=torch.float64)


@pytest.mark.parametrize("name", CORRECT)
def test_no_false_alarm(name, caplog):
    first_window(CORRECT[name]())
    assert not caplog.records


@pytest.mark.parametrize(
    "name", tiered(FAULTS, ["tokens counted by rows", "two means", "contrastive"], "further faults")
)
def test_what_certify_names_is_refused_by_that_name(name):
    make, kind, where, text = WRONG[name]
    step = make()
    for _ in range(2):  # nothing is remembered of what was refused
        with pytest.raises(ValueError, match=rf"must add up .*: {kind} at .*See docs/") as refused:
            first_window(step)
        assert where in str(refused.value)
        assert text in str(refused.value)
    first_window(step, check=False)


@pytest.mark.parametrize("name", sorted(UNSEEN))
def test_what_is_no_fault_of_the_loss_is_not_refused(name):
    first_window(WRONG[name][0]())


def halves(model, x):
    half = len(x) // 2
    return -F.logsigmoid(model(x[:half]) - model(x[half : 2 * half])).mean()


def in_batch_negatives(model, b):
    return F.cross_entropy(model(b["q"]) @ b["n"].T, torch.zeros(len(b["q"]), dtype=torch.long))


COUPLED = {
    "a list of samples": (
        lambda: linear(),
        lambda model, b: torch.stack([model(s)[:, 0].softmax(0)[0] for s in b]).mean(),
        lambda: [rows(4) for _ in range(6)],
        2,
    ),
    "time on the first axis": (
        lambda: nn.LSTM(2, 3, dtype=torch.float64),
        lambda model, x: (model(x)[0] ** 2).mean(),
        lambda: rows(6, 4, 2),
        2,
    ),
    "negatives as many as rows": (
        lambda: linear(2, 2),
        in_batch_negatives,
        lambda: {"q": rows(4), "n": rows(4)},
        2,
    ),
    "concatenated halves": (linear, halves, lambda: rows(8), 4),
    "row numbers as a column": (
        linear,
        lambda model, b: (model(b[0][b[1]]) ** 2).mean(),
        lambda: [rows(8), torch.tensor([0, 0, 0, 0, 1, 0, 0, 0])],
        4,
    ),
    "an order of rows that is drawn": (
        linear,
        lambda model, x: (model(x)[torch.randperm(len(x))] * model(x)).mean(),
        lambda: rows(8),
        4,
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_see_each_other_are_refused(name):
    make, loss, batch, size = COUPLED[name]
    model = make()
    with pytest.raises(ValueError, match=r"coupled_rows at .*See docs/guides/rowwise\.md"):
        vb.backward(partial(loss, model), batch(), module=model, microbatch_size=size)


def test_pairs_that_no_micro_batch_cuts_apart_are_right(caplog):
    model, x = linear(), rows(8)

    def loss_fn(x):
        return -F.logsigmoid(model(x[0::2]) - model(x[1::2])).mean()

    (expected,) = torch.autograd.grad(loss_fn(x), [model.weight])
    vb.backward(loss_fn, x, module=model, microbatch_size=4)
    assert_close(model.weight.grad, expected)
    assert "belong together by 2" in caplog.text
    with pytest.raises(ValueError, match=r"multiple of 2\. Got micro-batches of 3, 3, 2 rows"):
        vb.backward(loss_fn, x, module=model, microbatch_size=3)


def floor(model, b):
    return F.softplus(model(b[0])).sum() / b[1].sum().clamp(min=1)


@pytest.mark.parametrize(
    ("mask", "size"), [([1, 0], 1), ([0, 1], 1), ([1, 0, 1, 1, 0, 0, 1, 1], 2)]
)
def test_a_divisor_with_a_floor_is_refused_where_a_micro_batch_is_empty(mask, size):
    model = linear()
    batch = [rows(len(mask)), torch.tensor(mask, dtype=torch.float64)]
    call = partial(vb.backward, module=model, microbatch_size=size)
    with pytest.raises(ValueError, match=r"weight 0 is left out.*divide by the count of the whole"):
        call(partial(floor, model), batch, weight=lambda b: b[1].sum())
    # As the text advises.
    whole = batch[1].sum().clamp(min=1)
    call(lambda b: F.softplus(model(b[0])).sum() / whole, batch, weight="sum")
    expected = torch.autograd.grad(floor(model, batch), [model.weight])[0]
    assert_close(model.weight.grad, expected)


def test_a_micro_batch_without_weight_hides_no_other_fault():
    model, x = linear(), rows(8)
    mask = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]).double()
    with pytest.raises(ValueError, match="sum_loss"):
        vb.backward(
            lambda b: (model(b[0])[:, 0] ** 2 * b[1]).sum(),
            [x, mask],
            module=model,
            microbatch_size=2,
            weight=lambda b: b[1].sum(),
        )


def test_rows_that_count_nothing_prove_nothing():
    model, x, mask = linear(), rows(64), torch.zeros(64).double()
    mask[[6, 21, 40]] = 1.0
    with pytest.raises(ValueError, match="must add up"):
        vb.backward(
            lambda b: (model(b[0])[:, 0] ** 2 * b[1]).sum() / b[1].sum().clamp(min=1),
            [x, mask],
            module=model,
            microbatch_size=16,
        )


def test_a_loss_without_gradient_is_tried_again_when_it_has_one(caplog):
    model, x = linear(), rows(8)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    call = partial(vb.backward, lambda x: (model(x) ** 2).sum(), x, module=model)
    for _ in range(2):
        call(microbatch_size=2)
    assert [record.getMessage().count("is 0, or not finite") for record in caplog.records] == [1]
    with torch.no_grad():
        model.weight.fill_(1.0)
    with pytest.raises(ValueError, match="sum_loss"):
        call(microbatch_size=2)


def test_a_criterion_of_another_kind_is_tried_anew():
    model, batch = linear(2, 3), [rows(8), torch.arange(8) % 3]

    def loss_by(criterion):
        return lambda b: criterion(model(b[0]), b[1])

    call = partial(vb.backward, batch=batch, module=model, microbatch_size=2)
    call(loss_by(nn.CrossEntropyLoss()))
    with pytest.raises(ValueError, match="sum_loss"):
        call(loss_by(nn.CrossEntropyLoss(reduction="sum")))


class OpensAutocast(nn.Module):
    """float32 from outside: autocast is opened in its own forward pass, as Accelerate does it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.last = nn.Linear(64, 64)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            found = self.last(self.layers(x))
        return found.float()


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_is_found_where_a_model_opens_autocast(seed):
    torch.manual_seed(seed)
    model = OpensAutocast()
    y = torch.randint(0, 64, (12, 5)).masked_fill(torch.rand(12, 5) < 0.6, -100)
    y[:, 0] = 1
    batch = read((torch.randn(12, 5, 8), y))

    def loss_fn(b):
        return F.cross_entropy(model(b[0]).flatten(0, 1), b[1].flatten())

    by_rows, by_labels = (
        Program(loss_fn, weight, False, None, inventory(model))
        for weight in (lambda b: len(b[0]), lambda b: (b[1] != -100).sum())
    )
    found = found_weight([by_rows, by_labels], batch, batch.cut(3, None), lambda: None)
    assert found.place == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_sum_in_bfloat16_is_refused(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).bfloat16()
    batch = [torch.randn(16, 4), torch.arange(16) % 3]
    with pytest.raises(ValueError, match=r'(sum_loss|weight) at .*weight="sum".*/weights\.md'):
        vb.backward(
            lambda b: F.cross_entropy(model(b[0].bfloat16()), b[1], reduction="sum"),
            batch,
            module=model,
            microbatch_size=2,
        )


def test_a_floor_of_one_term_is_refused_too():
    model, batch = linear(), [rows(4), torch.tensor([1.0, 0, 1, 1]).double()]

    def loss_fn(b):
        return {"box": floor(model, b), "all": (model(b[0]) ** 2).mean()}

    def weight(b):
        return {"box": b[1].sum(), "all": len(b[0])}

    with pytest.raises(ValueError, match=r"at term 'box'.* weight 0 is left out"):
        vb.backward(loss_fn, batch, module=model, microbatch_size=1, weight=weight)


def test_a_floor_that_is_not_reached_first_is_refused_when_it_is():
    model = linear()
    full, empty = torch.ones(4, dtype=torch.float64), torch.tensor([0.0, 0, 1, 1]).double()
    call = partial(vb.backward, partial(floor, model), module=model, microbatch_size=2)
    call([rows(4), full], weight=lambda b: b[1].sum())
    with pytest.raises(ValueError, match="weight 0 is left out"):
        call([rows(4), empty], weight=lambda b: b[1].sum())


def test_a_regulariser_in_a_masked_mean_is_right():
    model, x, mask = linear(), rows(6), torch.tensor([0.0, 0, 1, 1, 0, 1]).double()

    def loss_fn(b):
        masked = (model(b[0])[:, 0] ** 2 * b[1]).sum() / b[1].sum().clamp(min=1)
        return masked + (model.weight**2).sum()

    (expected,) = torch.autograd.grad(loss_fn([x, mask]), [model.weight])
    vb.backward(loss_fn, [x, mask], module=model, microbatch_size=2, weight=lambda b: b[1].sum())
    assert_close(model.weight.grad, expected)


def test_a_parameter_that_no_module_holds_is_refused_in_any_dtype():
    encoder, head = linear(2, 3), linear(3, 1)
    with pytest.raises(ValueError, match="is in no module"):
        vb.backward(lambda x: head(encoder(x)).mean(), rows(4), module=encoder, microbatch_size=2)
    assert head.weight.grad is None


def test_a_term_without_a_gradient_is_refused():
    model = linear()

    def loss_fn(x):
        found = model(x)
        return {"ce": (found**2).mean(), "accuracy": (found < 9).double().mean()}

    with pytest.raises(ValueError, match="Got 'accuracy' without one"):
        vb.backward(loss_fn, rows(4), module=model, microbatch_size=2)


def test_a_loss_over_a_whole_batch_from_outside_is_told(caplog):
    model, whole = linear(), rows(16)
    vb.backward(lambda x: (model(whole) ** 2).mean(), whole, module=model, microbatch_size=4)
    assert "the same whatever rows it is given" in caplog.text


def by_numpy(model, x):
    return (model(x + torch.as_tensor(np.random.randn(*x.shape))) ** 2).mean()


def by_python(model, x):
    return (model(x) ** 2).mean() * random.random()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (by_numpy, "random numbers by Python or NumPy"),
        (by_python, "random numbers by Python or NumPy"),
        (lambda model, x: (model(x).view(5, -1) ** 2).mean(), "RuntimeError: shape"),
        (lambda model, x: (model(x) ** 2).mean() * float("nan"), "0, or not finite"),
    ],
    ids=["NumPy", "Python", "an error of its own", "NaN"],
)
def test_what_cannot_be_tried_is_told_once_and_runs(loss, reason, caplog):
    model = linear()
    for _ in range(2):
        vb.backward(partial(loss, model), rows(10), module=model, microbatch_size=5)
    (message,) = (text for text in caplog.messages if "could not be tried" in text)
    assert reason in message


class Everything(nn.Module):
    """Layers that draw, count and keep statistics."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.latest = None

    def forward(self, x):
        self.calls += 1
        self.latest = self.drop(self.norm(self.first(x)))
        return self.last(self.latest)


def trained(check):
    """State, gradients, loss and random numbers after two windows."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = Everything()
    x = torch.randn(8, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    loss_fn = lambda x: (model(x) ** 2).mean()  # noqa: E731
    losses = [
        vb.backward(loss_fn, x, module=model, microbatch_size=4, check=check) for _ in range(2)
    ]
    assert all(layer.training for layer in model.modules())
    grads = [p.grad for p in model.parameters()]
    numbers = [torch.rand(2), torch.tensor(random.random()), torch.tensor(np.random.rand())]
    return [*losses, *grads, *model.state_dict().values(), *numbers]


def test_training_is_the_same_to_the_bit_with_and_without_it():
    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


def test_a_refusal_leaves_everything_as_it_was():
    model = Everything()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in model.parameters()]
    before = [x.clone() for x in model.state_dict().values()]
    x, state = rows(8).float(), torch.get_rng_state()
    with pytest.raises(ValueError, match="sum_loss"):
        vb.backward(lambda x: (model(x) ** 2).sum(), x, module=model, microbatch_size=2)
    assert all(
        p.grad is g and (g == 1).all() for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.latest is None


def test_each_loss_is_tried_once():
    model, counts = linear(), []

    def windows_of(make, batches):
        counts.clear()
        found = []
        for batch in batches:
            counts.clear()
            vb.backward(make(), batch, module=model, microbatch_size=4)
            found.append(len(counts))
        return found

    def made_anew():
        return lambda b: (counts.append(1), model(b["x"]).mean())[1]

    x = {"x": rows(8)}
    # Three pairs of three runs each, before two micro-batches.
    assert windows_of(made_anew, [x, x, {"x": rows(12)}]) == [11, 2, 3]
    # Another structure is tried again.
    assert windows_of(made_anew, [x | {"y": rows(8)}]) == [11]


def test_a_window_of_one_micro_batch_is_only_looked_at():
    model, counts = linear(), []

    def loss_fn(x):
        counts.append(len(x))
        return (model(x) ** 2).sum()

    vb.backward(loss_fn, rows(4), module=model, microbatch_size=4)
    vb.backward(loss_fn, rows(4), module=model, microbatch_size=4)
    assert counts == [1, 4, 4]


class EvaluatedOtherwise(nn.Module):
    """A detector: a loss in training mode, something else in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))

    def forward(self, x):
        return (self.layer(x) ** 2).mean() if self.training else ["boxes"]


def test_a_model_that_has_no_loss_in_evaluation_mode_is_tried_in_training_mode(caplog):
    model = EvaluatedOtherwise()
    vb.backward(model, rows(8).float(), module=model, microbatch_size=2)
    assert not caplog.records
    with pytest.raises(ValueError, match="sum_loss"):
        vb.backward(lambda x: model(x) * len(x), rows(8).float(), module=model, microbatch_size=2)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_changed_in_place_are_clones_when_memory_runs_out(size):
    model, x = linear(), rows(4)
    given, sizes = x.clone(), []

    def loss_fn(x):
        x.mul_(2)
        sizes.append(len(x))
        if len(x) == size and sizes.count(size) > 1:
            raise torch.OutOfMemoryError
        return (model(x) ** 2).mean()

    (expected,) = torch.autograd.grad((model(given * 2) ** 2).mean(), [model.weight])
    vb.backward(loss_fn, x, module=model, microbatch_size=size)
    assert_close(model.weight.grad, expected)
    assert torch.equal(x, given)


def test_a_window_without_rows_is_told_once(caplog):
    model = linear()
    window = vb.Window([{"x": rows(5), "e": rows(7)}, {"x": rows(3), "e": rows(4)}])
    for _ in range(2):
        vb.backward(
            lambda b: (model(b["x"]) ** 2).mean(),
            window,
            module=model,
            weight=lambda b: len(b["x"]),
        )
    assert [record.getMessage().count("no common rows") for record in caplog.records] == [1]


def test_lists_as_long_as_the_batch_are_cut_with_it():
    model, x = linear(), rows(4, 5, 2)
    lengths = [5, 4, 2, 1]

    def loss_fn(b):
        parts = [model(x[:n]).mean() for x, n in zip(b["x"], b["n"], strict=True)]
        return torch.stack(parts).mean()

    expected = torch.autograd.grad(loss_fn({"x": x, "n": lengths}), [model.weight])
    vb.backward(loss_fn, {"x": x, "n": lengths}, module=model, microbatch_size=2)
    assert_all_close([model.weight.grad], list(expected))


def test_small_micro_batches_of_a_window_are_tried_on_the_rows_of_several():
    """Those of the first weigh the same, so that it alone would show nothing."""
    model = linear(2, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, -100, -100, 2])
    pieces = [(rows(2), labels[k : k + 2]) for k in range(0, 8, 2)]

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"Pass weight=lambda batch: \(batch\[1\] != -100\)"):
        vb.backward(loss_fn, vb.Window(pieces), module=model)
    vb.backward(loss_fn, vb.Window(pieces), module=model, weight=lambda b: (b[1] != -100).sum())


@pytest.mark.parametrize("kind", ["wrong", "right"])
def test_a_loss_proves_itself_where_somebody_else_calls_backward(kind):
    """A hook that steps an optimizer is refused by `backward`, not by `loss`."""
    model, x = linear(), rows(8)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    divisor = 4 if kind == "wrong" else 8

    def loss_fn(x):
        return (model(x) ** 2).sum() / (divisor if kind == "wrong" else len(x))

    if kind == "right":
        vb.loss(loss_fn, x, module=model, microbatch_size=2).backward()
        return
    with pytest.raises(ValueError, match="Got a loss whose first rows show"):
        vb.loss(loss_fn, x, module=model, microbatch_size=2)
    assert model.weight.grad is None
