"""certify: no false alarm on correct steps, the right cause for wrong ones and wrong engines."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from tests.tiers import tiered
from tests.torch.certify_models import (
    CORRECT,
    ROWS,
    WRONG,
    Language,
    Unused,
    classifier,
    language,
    masked,
    mlp,
    regression,
    with_noise,
)
from torch import nn

import virtualbatch.torch as vb
from virtualbatch.torch._grad_watch import GradWatch
from virtualbatch.torch._gradients import WindowGradients

# Kinds of findings that values inside a forward tell.
FROM_ACTIVATIONS = ("batchnorm", "coupled_rows", "non_finite", "stateful")


def certified(step, microbatch_size=7):
    step = dict(step)
    return vb.certify(
        step.pop("loss_fn"), step.pop("batch"), microbatch_size=microbatch_size, **step
    )


@pytest.mark.parametrize(
    "name",
    tiered(
        CORRECT,
        [
            "dropout",
            "sparse embedding",
            "transformer",
            "two terms and a regulariser",
            "bfloat16",
            "noise",
        ],
        "further correct models",
    ),
)
def test_no_false_alarm(name):
    found = certified(CORRECT[name]())
    assert found.findings == ()
    assert found.exact
    assert found.max_error <= found.tolerance
    assert found.loss_error <= found.tolerance
    found.raise_if_inexact()


def test_there_are_thirty_correct_models():
    assert len(CORRECT) >= 30


@pytest.mark.parametrize(
    "name",
    tiered(
        WRONG,
        [
            "tokens counted by rows",
            "counted in bfloat16",
            "a sum",
            "a sum and a regulariser",
            "contrastive",
            "batch norm",
            "a layer that remembers",
            "logarithm",
        ],
        "further models of the same kinds",
    ),
)
@pytest.mark.parametrize("size", tiered([4, 8], [4], "further cuts"))
def test_the_cause_is_named(name, size):
    make, kind, where, text = WRONG[name]
    found = certified(make(), size)
    assert not found.exact
    first = found.findings[0]
    assert (first.kind, len(found.findings)) == (kind, 1), found
    assert where in first.where
    assert text in first.why + first.fix
    with pytest.raises(ValueError, match=f"NOT exact(.|\n)*{kind}"):
        found.raise_if_inexact()


@pytest.mark.parametrize("name", [name for name in WRONG if WRONG[name][1] in FROM_ACTIVATIONS])
def test_the_cause_is_the_same_from_sketches(name, monkeypatch):
    step = WRONG[name][0]()
    due = certified(step, 4)
    monkeypatch.setattr("virtualbatch.certify.activations._KEPT_BYTES", 0)
    assert certified(step, 4).findings == due.findings


def test_a_loss_of_several_terms_names_the_wrong_one():
    step = CORRECT["two terms and a regulariser"]()
    right = step["weight"]
    found = certified(step | {"weight": lambda b: right(b) | {"values": len(b["x"])}})
    assert [finding.kind for finding in found.findings] == ["weight"]
    assert "term 'values'" in found.findings[0].where
    assert "batch['mask'].sum()" in found.findings[0].fix


def test_parameters_without_a_gradient_are_named_and_nothing_is_wrong():
    found = certified(regression(Unused()))
    assert found.exact
    assert [(f.kind, f.where) for f in found.findings] == [
        ("no_gradient", "unused.weight"),
        ("no_gradient", "unused.bias"),
    ]


def mean_of_means(patch):
    patch.setattr("virtualbatch.window.weights.shares", lambda w, total=None: [1 / len(w)] * len(w))


def adding(patch, change):
    """Replaces how one micro-batch is added: (original, self, terms, shares, number) -> None."""
    original, calls = WindowGradients.add, []

    def add(self, terms, shares):
        calls.append(self)
        change(original, self, terms, shares, sum(one is self for one in calls) - 1)

    patch.setattr(WindowGradients, "add", add)


def dropped_last(patch):
    def change(original, self, terms, shares, number):
        if number < 3:
            original(self, terms, shares)

    adding(patch, change)


def scaled_twice(patch):
    adding(patch, lambda add, self, terms, shares, n: add(self, terms, [s / 4 for s in shares]))


def not_scaled(patch):
    adding(patch, lambda add, self, terms, shares, n: add(self, terms, [1.0 for s in shares]))


def after_each(patch, change):
    """Changes what a micro-batch adds: (parameter's index, what it added, number) -> that."""

    def wrapped(original, self, terms, shares, number):
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        original(self, terms, shares)
        added = change([p.grad for p in self.parameters], shares[0], number)
        for parameter, old, new in zip(self.parameters, before, added, strict=True):
            parameter.grad = new if old is None else old + new

    # It would take the change for one of the loss function.
    patch.setattr(GradWatch, "check", lambda self: None)
    adding(patch, wrapped)


def clipped_each(patch):
    def change(gradients, share, number):
        norm = torch.stack([g.norm() for g in gradients]).norm()
        return [g * (1e-3 * share / norm) for g in gradients]

    after_each(patch, change)


def lost_of_one(index):
    def mutate(patch):
        after_each(
            patch,
            lambda gradients, share, number: [
                g * 0 if k == index and number else g for k, g in enumerate(gradients)
            ],
        )

    return mutate


def stale(patch):
    original, kept = WindowGradients.prepare, {}

    def prepare(self, commit):
        original(self, commit)
        for parameter in self.parameters:
            parameter.grad = parameter.grad + kept.get(id(parameter), 0)
            kept[id(parameter)] = parameter.grad.clone()

    patch.setattr(WindowGradients, "prepare", prepare)


def wrong_term(patch):
    adding(patch, lambda add, self, terms, shares, n: add(self, terms, [*shares[1:], shares[0]]))


# mutation -> (change, step)
MUTATIONS = {
    "mean of means": (mean_of_means, lambda: classifier(mlp())),
    "mean of means of tokens": (mean_of_means, lambda: language(Language())),
    "missing last": (dropped_last, lambda: classifier(mlp())),
    "share of the wrong term": (wrong_term, lambda: CORRECT["two terms and a regulariser"]()),
    "scaled twice": (scaled_twice, lambda: classifier(mlp())),
    "not scaled": (not_scaled, lambda: language(Language())),
    "stale accumulator": (stale, lambda: classifier(mlp())),
    "clipped each": (clipped_each, lambda: classifier(mlp())),
    "tied gradient dropped": (lost_of_one(0), lambda: language(Language(tied=True))),
    "scatter gradient lost": (lost_of_one(0), lambda: language(Language())),
    "one layer lost": (lost_of_one(2), lambda: classifier(mlp())),
}


@pytest.mark.parametrize(
    "name",
    tiered(
        MUTATIONS,
        ["mean of means", "stale accumulator", "share of the wrong term", "one layer lost"],
        "further wrong engines; they end in the same finding",
    ),
)
def test_a_wrong_engine_is_red_and_says_so(name, monkeypatch):
    mutate, make = MUTATIONS[name]
    step = make()
    assert certified(step, 6).exact
    mutate(monkeypatch)
    found = certified(step, 6)
    assert not found.exact
    (finding,) = found.findings
    assert (finding.kind, finding.where) == ("stateful", "the window")
    assert "bug of virtualbatch: please report it" in finding.fix


def test_nothing_is_touched():
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5))
    step = classifier(module)
    step["loss_fn"](step["batch"]).backward()
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    gradients = [(p.grad, p.grad.clone(), p.data_ptr(), p.dtype) for p in module.parameters()]
    data = [x.clone() for x in step["batch"]]
    random = torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    certified(step)
    certified(with_noise())
    for old, new in zip(before, (module.state_dict(), optimizer.state_dict()), strict=True):
        assert str(old) == str(new)
    for name, value in before[0].items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=0)
    for parameter, (grad, value, place, dtype) in zip(module.parameters(), gradients, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)
        assert (parameter.data_ptr(), parameter.dtype) == (place, dtype)
    assert all(map(torch.equal, data, step["batch"]))
    torch.manual_seed(0)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    assert torch.get_default_dtype() == torch.float32
    torch.set_rng_state(random)


def test_random_numbers_go_on_from_where_they_were():
    step = classifier(mlp(nn.Dropout(0.5)))
    torch.manual_seed(3)
    due = torch.rand(4)
    torch.manual_seed(3)
    certified(step)
    assert torch.equal(torch.rand(4), due)


def test_an_error_of_the_users_leaves_everything_too():
    module = mlp()

    def loss_fn(batch):
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        vb.certify(loss_fn, torch.ones(6, 8), module=module, microbatch_size=2)
    assert module[0].weight.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_switches_of_the_process_are_as_they_were(fails):
    module, seen = nn.Linear(8, 4), []

    def loss_fn(batch):
        seen.append((torch.get_default_dtype(), _stance()))
        if fails:
            raise KeyError("theirs")
        return module(batch).square().mean()

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.compiler.set_stance("eager_on_recompile"):
            with pytest.raises(KeyError) if fails else nullcontext():
                vb.certify(loss_fn, torch.randn(ROWS, 8), module=module, microbatch_size=7)
            after = torch.get_default_dtype(), _stance()
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {(torch.float64, "force_eager")}
    assert after == (torch.bfloat16, "eager_on_recompile")


def _stance():
    """The compiler's stance; PyTorch tells it only to who sets another one."""
    other = torch.compiler.set_stance("default")
    with other:
        return other.prev.stance


def test_randomness_without_rows_is_replaced_and_said():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        # Drawn with the rows behind another axis that depends on them.
        noise = torch.rand(len(x) + 1)[1:]
        return (module(x) ** 2 * noise[:, None]).mean()

    found = vb.certify(loss_fn, torch.randn(ROWS, 8), module=module, microbatch_size=7)
    assert found.exact
    assert any("replaced by constants" in note for note in found.notes)


def test_a_certificate_can_be_read_and_stored():
    found = certified(masked())
    data = json.loads(found.to_json())
    assert data["exact"] is False
    assert data["findings"][0]["kind"] == "weight"
    assert set(data["parameters"]) == {"weight", "bias"}
    assert str(found).startswith("NOT exact: largest error")
    assert "<b>weight</b>" in found._repr_html_()
    broken = certified(WRONG["NaN in the data"][0]())
    assert json.loads(broken.to_json())["max_error"] is None


@pytest.mark.parametrize(
    ("batch", "sizes", "text"),
    [
        (torch.ones(1, 8), {"microbatch_size": 1}, "Got 1 rows in one"),
        (torch.ones(6, 8), {"microbatch_size": 6}, "Got 6 rows in one"),
        (torch.ones(6, 8), {"microbatch_size": 9}, "Got 6 rows in one"),
        (torch.ones(6, 8), {"accumulation_steps": 1}, "Got 6 rows in one"),
        (torch.ones(6, 8), {}, "microbatch_size"),
        (vb.Window([torch.ones(3, 8)]), {}, "Got a Window"),
    ],
)
def test_refusals(batch, sizes, text):
    module = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=text):
        vb.certify(lambda x: module(x).mean(), batch, module=module, **sizes)
    assert module.weight.grad is None
