"""Losses that change what the next micro-batch, or the next attempt, reads: refused or right."""

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb
from virtualbatch.torch._batch import read

X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def linear(dtype=torch.float64):
    return nn.Linear(2, 1, dtype=dtype)


def by_backward(model, batch):
    """An adversarial step as tutorials have it."""
    x = batch.clone().requires_grad_()
    model(x).square().mean().backward()
    model.zero_grad()
    return model(x.detach() + 0.1 * x.grad.sign()).square().mean()


def by_grad(model, batch):
    """The same, as the refusal says."""
    x = batch.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().mean(), x)
    return model(x.detach() + 0.1 * found.sign()).square().mean()


def emptied(model, batch):
    model.zero_grad()
    return model(batch).square().mean()


def zeroed(model, batch):
    model.zero_grad(set_to_none=False)
    return model(batch).square().mean()


def added_to(model, batch):
    model(batch).square().mean().backward()
    return model(batch).square().mean()


def added_to_later(model, batch, calls):
    calls.append(batch)
    return added_to(model, batch) if len(calls) == 2 else model(batch).square().mean()


CHANGES = {
    "an adversarial step": by_backward,
    "zero_grad": emptied,
    "zero_grad in place": zeroed,
    "backward": added_to,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*CHANGES, "backward in the second"])
@pytest.mark.parametrize("kept", [True, False], ids=["some .grad", "no .grad"])
def test_changes_of_grad_are_refused_and_leave_no_trace(name, dtype, kept):
    model, x = linear(dtype), X.to(dtype)
    before = [torch.full_like(p, 0.5) if kept else None for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    calls = []

    def loss_fn(batch):
        if name == "backward in the second":
            return added_to_later(model, batch, calls)
        return CHANGES[name](model, batch)

    with pytest.raises(
        ValueError, match=r"leave \.grad alone.* Got zero_grad\(\) or backward\(\) in"
    ) as e:
        vb.backward(loss_fn, x, module=model, microbatch_size=2)
    assert "torch.autograd.grad(...)" in str(e.value)
    assert str(e.value).endswith("See docs/guides/state.md.")
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or bool((gradient == 0.5).all())


def test_the_way_out_is_exact():
    model = linear()
    by_backward(model, X).backward()
    due = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    vb.backward(lambda batch: by_grad(model, batch), X, module=model, microbatch_size=2)
    torch.testing.assert_close([p.grad for p in model.parameters()], due, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change", [by_backward, emptied, zeroed, added_to])
@pytest.mark.parametrize("kept", [True, False], ids=["some .grad", "no .grad"])
def test_one_micro_batch_is_the_step_without_a_window(change, kept):
    model = linear()

    def gradients(step):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5) if kept else None
        step()
        return [p.grad.clone() for p in model.parameters()]

    due = gradients(lambda: change(model, X).backward())
    found = gradients(
        lambda: vb.backward(lambda batch: change(model, batch), X, module=model, microbatch_size=6)
    )
    assert all(map(torch.equal, found, due))


def test_certify_finds_changes_of_grad():
    model = linear()
    for change in (by_backward, added_to):
        found = vb.certify(lambda b, f=change: f(model, b), X, module=model, microbatch_size=2)
        (finding,) = found.findings
        assert not found.exact
        assert finding.kind == "stateful"
        assert "torch.autograd.grad(...)" in finding.fix
    assert all(p.grad is None for p in model.parameters())


def changing(model, fails=()):
    """A loss that doubles its rows in place, and runs out of memory with as many as told."""

    def loss_fn(batch):
        batch["x"].mul_(2)
        if len(batch["x"]) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(batch["x"]).square().mean()

    return loss_fn


@pytest.mark.parametrize("as_window", [False, True], ids=["batch", "Window"])
def test_rows_that_changed_are_not_run_again(as_window):
    model, rows = linear(), {"x": X.clone()}
    kept = model.weight.grad = torch.ones_like(model.weight)
    cut = {"microbatch_size": None} if as_window else {"microbatch_size": 6}
    batch = vb.Window([rows]) if as_window else rows
    with pytest.raises(ValueError, match=r"must not change its rows.* Got batch\['x'\]") as e:
        vb.backward(changing(model, fails=[6]), batch, module=model, **cut)
    assert "x = x * 2" in str(e.value)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)
    assert model.weight.grad is kept
    assert bool((kept == 1).all())


def test_clones_of_rows_may_be_changed_and_run_again():
    given = {"x": X.clone(), "name": "n"}
    for micro in (*read(given).protected().cut(2, None), read(given).protected().whole):
        for _ in range(2):
            batch = micro.get()
            assert batch["name"] == "n"
            batch["x"].zero_()
    (piece,) = read(vb.Window([given])).protected().cut(None, None)
    piece.get()["x"].zero_()
    assert torch.equal(given["x"], X)


def test_plan_and_certify_leave_rows_as_they_were(quick_plans):
    model, rows = linear(), {"x": X.clone()}
    vb.plan(changing(model), rows, module=model)
    assert torch.equal(rows["x"], X)

    def by_value(batch):  # Fake tensors have none, so windows run.
        assert batch["x"].sum().item()
        return changing(model)(batch)

    vb.plan(by_value, rows, module=model)
    assert torch.equal(rows["x"], X)
    rows["x"].requires_grad_()
    kept = rows["x"].grad = torch.ones_like(X)
    found = vb.certify(changing(model), rows, module=model, microbatch_size=2)
    assert found.exact
    assert rows["x"].grad is kept
    assert bool((kept == 1).all())
    assert torch.equal(rows["x"], X)


def test_a_graph_that_micro_batches_share():
    encoder, head = nn.Sequential(linear(), nn.Tanh()), nn.Linear(1, 1, dtype=torch.float64)
    both = [encoder, head]

    def loss_fn(batch):
        return head(batch).square().mean()

    with pytest.raises(
        ValueError, match=r"carry no graph.* Got batch with grad_fn=TanhBackward0.* inside loss_fn"
    ):
        vb.backward(loss_fn, encoder(X), module=both, microbatch_size=2)
    # A Window may bring graphs; one that its micro-batches share is used up by the first.
    shared = encoder(X)
    with pytest.raises(
        ValueError, match=r"a graph of its own\. .*inside loss_fn, or detach\(\) it"
    ):
        vb.backward(loss_fn, vb.Window([shared[:2], shared[2:]]), module=both)
    assert all(p.grad is None for module in both for p in module.parameters())
    (finding,) = vb.certify(loss_fn, encoder(X), module=both, microbatch_size=2).findings
    assert finding.kind == "stateful"
    assert "inside loss_fn" in finding.fix
    vb.backward(lambda x: loss_fn(encoder(x)), X, module=both, microbatch_size=2)
    found = [p.grad.clone() for module in both for p in module.parameters()]
    for module in both:
        module.zero_grad()
    loss_fn(encoder(X)).backward()
    due = [p.grad for module in both for p in module.parameters()]
    torch.testing.assert_close(found, due, rtol=1e-12, atol=1e-14)


def test_other_errors_of_a_backward_pass_are_left_alone():
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("mine")

    model = linear()
    with pytest.raises(RuntimeError, match=r"^mine$"):
        vb.backward(lambda x: Mine.apply(model(x)).mean(), X, module=model, microbatch_size=2)


def shuffled(model, batch):
    return model(batch[torch.randperm(len(batch))]).square().mean()


def mixed(model, batch):
    return model((batch + batch[torch.randperm(len(batch))]) / 2).square().mean()


def with_negatives(model, batch):
    return (model(batch) * model(batch[torch.randint(0, len(batch), (len(batch),))])).mean()


def with_one(model, batch):
    return (model(batch) * model(batch[torch.multinomial(torch.ones(len(batch)), 1)])).mean()


@pytest.mark.parametrize("loss", [mixed, with_negatives, with_one])
def test_row_numbers_that_are_drawn_couple_rows(loss):
    model = linear()
    found = vb.certify(lambda b: loss(model, b), X, module=model, microbatch_size=2)
    assert [finding.kind for finding in found.findings] == ["coupled_rows"]
    assert "test_state_in_losses.py" in found.findings[0].where


def test_an_order_of_rows_that_is_drawn_does_no_harm():
    model = linear()
    assert vb.certify(lambda b: shuffled(model, b), X, module=model, microbatch_size=2).exact
