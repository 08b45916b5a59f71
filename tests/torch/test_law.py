"""The law: a cut batch has the loss and the gradients of the uncut one."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.oracle import assert_all_close, assert_close, tolerance
from tests.torch.problems import NAMES, problem, taken, uncut

import virtualbatch.torch as vb

# Rows of the batch and of a micro-batch.
CUTS = {
    "even": (12, 4),
    "ragged": (11, 4),
    "lone last row": (9, 4),
    "one micro-batch": (5, 8),
    "one row each": (5, 1),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_law(name, cut):
    rows, size = CUTS[cut]
    loss_fn, weight, make_batch, module, _ = problem(name)
    batch = make_batch(rows)
    expected_loss, expected = uncut(loss_fn, batch, module)
    loss = vb.backward(loss_fn, batch, module=module, microbatch_size=size, weight=weight)
    assert_close(loss, expected_loss)
    assert_all_close(taken(module), expected)
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert not loss.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_within_its_rounding(name):
    wide, narrow = problem(name), problem(name, torch.float32)
    expected_loss, expected = uncut(wide.loss_fn, wide.batch(11), wide.module)
    loss = vb.backward(
        narrow.loss_fn,
        narrow.batch(11),
        module=narrow.module,
        microbatch_size=4,
        weight=narrow.weight,
    )
    allowed = tolerance("float32", 11 * narrow.summands)
    assert_close(loss, expected_loss, allowed)
    assert loss.dtype == narrow.module.kernel.grad.dtype == torch.float32
    assert_all_close(taken(narrow.module), expected, allowed)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_of_any_cut(name):
    loss_fn, weight, make_batch, module, _ = problem(name)
    batch = make_batch(11)
    expected_loss, expected = uncut(loss_fn, batch, module)
    window = vb.Window(
        {key: value[start:stop] for key, value in batch.items()}
        for start, stop in [(0, 5), (5, 6), (6, 11)]
    )
    assert_close(vb.backward(loss_fn, window, module=module, weight=weight), expected_loss)
    assert_all_close(taken(module), expected)


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 100])
def test_accumulation_steps(steps):
    loss_fn, _, make_batch, module, _ = problem("rows")
    batch = make_batch(8)
    sizes = []

    def counting_loss(batch):
        sizes.append(batch["x"].shape[0])
        return loss_fn(batch)

    expected_loss, expected = uncut(loss_fn, batch, module)
    loss = vb.backward(counting_loss, batch, module=module, accumulation_steps=steps)
    assert_close(loss, expected_loss)
    assert_all_close(taken(module), expected)
    # microbatch_size = ceil(8 / steps), cut evenly.
    assert sizes == {1: [8], 3: [3, 3, 2], 7: [2] * 4, 8: [1] * 8, 100: [1] * 8}[steps]


@pytest.mark.parametrize("size", [4, np.int64(4)])
def test_both_sizes_may_be_given_where_they_agree(size):
    loss_fn, _, make_batch, module, _ = problem("rows")
    batch = make_batch(11)
    _, expected = uncut(loss_fn, batch, module)
    vb.backward(loss_fn, batch, module=module, microbatch_size=size, accumulation_steps=3)
    assert_all_close(taken(module), expected)


def test_one_micro_batch_is_the_ordinary_computation_to_the_bit():
    loss_fn, weight, make_batch, module, _ = problem("tokens", torch.float32)
    batch = make_batch(11)
    expected_loss, expected = uncut(loss_fn, batch, module)
    loss = vb.backward(loss_fn, batch, module=module, microbatch_size=11, weight=weight)
    assert float(loss) == float(expected_loss)
    for found, due in zip(taken(module), expected, strict=True):
        np.testing.assert_array_equal(found, due)


def test_rows_may_come_in_any_order():
    loss_fn, weight, make_batch, module, _ = problem("terms")
    batch = make_batch(11)
    _, expected = uncut(loss_fn, batch, module)
    for _ in range(5):
        order = torch.randperm(11)
        shuffled = {key: value[order] for key, value in batch.items()}
        vb.backward(loss_fn, shuffled, module=module, microbatch_size=4, weight=weight)
        assert_all_close(taken(module), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_add_to_what_is_there(dtype):
    loss_fn, weight, make_batch, module, _ = problem("tokens", dtype)
    batch = make_batch(8)
    vb.backward(loss_fn, batch, module=module, microbatch_size=3, weight=weight)
    once = taken(module)
    tensors = []
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
        tensors.append(parameter.grad)
    vb.backward(loss_fn, batch, module=module, microbatch_size=3, weight=weight)
    for parameter, tensor in zip(module.parameters(), tensors, strict=True):
        assert parameter.grad is tensor
    allowed = 1e-12 if dtype == torch.float64 else tolerance("bfloat16", 2)
    assert_all_close(taken(module), [1 + gradient for gradient in once], allowed)


def test_two_windows_add_up():
    loss_fn, weight, make_batch, module, _ = problem("tokens")
    expected = [
        a + b
        for a, b in zip(
            uncut(loss_fn, make_batch(8), module)[1],
            uncut(loss_fn, make_batch(9), module)[1],
            strict=True,
        )
    ]
    for rows in (8, 9):
        vb.backward(loss_fn, make_batch(rows), module=module, microbatch_size=3, weight=weight)
    assert_all_close(taken(module), expected)


# Modules

X = torch.as_tensor(np.random.default_rng(1).normal(size=(10, 3)))


def linear(*sizes):
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    return torch.nn.Sequential(*layers).double()


def law_holds(loss_fn, module, batch=X, **options):
    """Raises unless the window has the gradients of the whole batch."""
    root = torch.nn.ModuleList(module) if isinstance(module, list) else module
    expected_loss, expected = uncut(loss_fn, batch, root)
    loss = vb.backward(loss_fn, batch, module=module, **({"microbatch_size": 4} | options))
    assert_close(loss, expected_loss)
    assert_all_close(taken(root), expected)


def test_tied_weights():
    model = linear(3, 3, 3)
    model[1].weight = model[0].weight
    law_holds(lambda x: model(x).square().mean(), model)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_several_modules(kind):
    first, second = linear(3, 2), linear(2, 1)
    expected = uncut(
        lambda x: second(first(x)).square().mean(), X, torch.nn.ModuleList([first, second])
    )[1]
    vb.backward(
        lambda x: second(first(x)).square().mean(),
        X,
        module=kind([first, second]),
        microbatch_size=4,
    )
    assert_all_close(taken(torch.nn.ModuleList([first, second])), expected)


def test_one_module_inside_another_is_summed_once():
    model = linear(3, 2, 1)
    law_holds(lambda x: model(x).square().mean(), [model, model[0]])


def test_parameters_of_a_module_that_was_not_named():
    # PyTorch itself sums into every leaf.
    model, head = linear(3, 2), linear(2, 1)
    expected = uncut(lambda x: head(model(x)).square().mean(), X, head)[1]
    vb.backward(lambda x: head(model(x)).square().mean(), X, module=model, microbatch_size=4)
    assert_all_close(taken(head), expected)


def test_frozen_parameters_keep_their_grad():
    model = linear(3, 2, 1)
    kept = torch.ones(2, 3, dtype=torch.float64)
    model[0].weight.requires_grad_(False).grad = kept
    vb.backward(lambda x: model(x).mean(), X, module=model, microbatch_size=4)
    assert model[0].weight.grad is kept
    assert (kept == 1).all()


def test_a_parameter_that_no_micro_batch_uses_has_no_gradient():
    model = linear(3, 2, 1)
    unused = torch.nn.Linear(2, 2)
    vb.backward(lambda x: model(x).mean(), X, module=[model, unused], microbatch_size=4)
    assert unused.weight.grad is None
    kept = unused.weight.grad = torch.ones(2, 2)
    vb.backward(lambda x: model(x).mean(), X, module=[model, unused], microbatch_size=4)
    assert unused.weight.grad is kept


def test_a_parameter_used_by_some_micro_batches_only():
    # Peer case R2: the branch is taken by the first micro-batch alone.
    model = linear(1, 1)

    def loss_fn(x):
        return model(x).mean() if x[0, 0] > 0 else (x * 0 + 1.0).mean()

    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    for rows in (x, x.flip(0)):
        vb.backward(loss_fn, rows, module=model, microbatch_size=2)
        assert_all_close(taken(model), [[[0.5]], [0.5]])


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("existing", [None, "sparse", "dense"])
def test_sparse_embeddings(existing, repeated):
    table = torch.nn.Embedding(6, 2, sparse=True, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [1, 2], [3, 3], [0, 5], [1, 1]])
    ids = ids * 0 if repeated else ids
    _, (expected,) = uncut(lambda ids: table(ids).square().mean(), ids, table)
    before = torch.zeros(6, 2, dtype=torch.float64)
    before[4] = 3.0
    if existing:
        table.weight.grad = before.to_sparse(1) if existing == "sparse" else before.clone()
        expected = expected + before.numpy()
    vb.backward(lambda ids: table(ids).square().mean(), ids, module=table, microbatch_size=2)
    assert table.weight.grad.is_sparse == (existing != "dense")
    assert_all_close(taken(table), [expected])


def test_a_recurrence():
    recurrent = torch.nn.LSTM(3, 4, batch_first=True).double()
    x = torch.randn(7, 5, 3).double()
    law_holds(lambda x: recurrent(x)[0].square().mean(), recurrent, x)


def test_complex_parameters():
    layer = torch.nn.Linear(3, 2, dtype=torch.complex128)

    def loss_fn(x):
        return layer(x.to(torch.complex128)).abs().square().mean()

    loss_fn(X).backward()
    expected = [parameter.grad.numpy() for parameter in layer.parameters()]
    layer.zero_grad()
    vb.backward(loss_fn, X, module=layer, microbatch_size=4)
    for parameter, due in zip(layer.parameters(), expected, strict=True):
        assert_close(parameter.grad.numpy().real, due.real)
        assert_close(parameter.grad.numpy().imag, due.imag)


def test_a_gradient_of_the_batch_itself():
    model = linear(3, 1)
    x = X.clone().requires_grad_()
    model(x).square().mean().backward()
    expected, x.grad = x.grad, None
    vb.backward(lambda x: model(x).square().mean(), x, module=model, microbatch_size=4)
    assert_close(x.grad, expected)


def test_an_optimizer_does_the_same_as_with_the_whole_batch():
    cut = linear(3, 4, 1)
    whole = copy.deepcopy(cut)
    for model in (cut, whole):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            if model is cut:
                vb.backward(lambda x: cut(x).square().mean(), X, module=cut, microbatch_size=3)
            else:
                whole(X).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
    assert_all_close(
        [p.detach() for p in cut.parameters()], [p.detach() for p in whole.parameters()], 1e-10
    )


def test_shares_are_formed_in_float64():
    # Thirds and sevenths formed in float32 would be off by 6e-8.
    model = linear(1, 1)
    x = torch.ones(7, 1, dtype=torch.float64)
    vb.backward(lambda x: model(x).mean(), x, module=model, microbatch_size=3)
    assert_close(model[0].bias.grad, [1.0], 1e-15)
