"""Gradients that PyTorch would let have the same memory, and then add to twice."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.oracle import assert_all_close
from tests.torch.problems import taken, uncut
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

import virtualbatch.torch as vb

X = torch.as_tensor(np.random.default_rng(1).normal(size=(10, 3)))


class Two(torch.nn.Module):
    """Two parameters of one shape, and a third that is not added to them."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, shape in {"a": 3, "b": 3, "scale": ()}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape, dtype=dtype)))


VIEWS = {
    "unsqueeze": lambda p: p.unsqueeze(0),
    "view": lambda p: p.view(1, 3),
    "transpose": lambda p: p.reshape(3, 1).T,
}


@pytest.mark.parametrize("backward_fn", [None, lambda loss: loss.backward()])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_gradients_that_pytorch_puts_in_the_same_memory(name, late, backward_fn):
    # As two embeddings of positions, added up. `late`: the first micro-batch does without them.
    model = Two()
    window = vb.Window(X.split(2))

    def loss_fn(x):
        shift = VIEWS[name](model.a) + VIEWS[name](model.b)
        return (x if late and x is window[0] else x + shift).mul(model.scale).square().mean()

    sum(map(loss_fn, window)).div(len(window)).backward()
    expected = taken(model)
    for x in window:
        (loss_fn(x) / len(window)).backward()
    # PyTorch itself adds twice to both: what is tested here does happen.
    assert model.a.grad.data_ptr() == model.b.grad.data_ptr()
    assert not np.allclose(taken(model)[0], expected[0])
    vb.backward(loss_fn, window, module=model, backward_fn=backward_fn)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()
    assert_all_close(taken(model), expected)


def test_parts_of_one_memory_that_overlap():
    model = Two()

    def loss_fn(x):
        # Of the six entries of one gradient, `a` gets the first three and `b` the third to fifth.
        left = torch.cat([model.a, x.new_zeros(3)])
        right = torch.cat([x.new_zeros(2), model.b, x.new_zeros(1)])
        return ((left + right) * x.repeat(1, 2)).square().mean()

    _, expected = uncut(loss_fn, X, model)
    loss_fn(X).backward()
    distance = model.b.grad.data_ptr() - model.a.grad.data_ptr()
    assert 0 < distance < model.a.grad.nbytes
    model.zero_grad()
    vb.backward(loss_fn, X, module=model, microbatch_size=4)
    assert_all_close(taken(model), expected)


def test_parts_of_one_memory_that_lie_side_by_side_are_not_copied():
    model = Two()

    def loss_fn(x):
        return (torch.cat([model.a, model.b]) * x.repeat(1, 2)).square().mean()

    _, expected = uncut(loss_fn, X, model)
    vb.backward(loss_fn, X, module=model, microbatch_size=4)
    storages = {p.grad.untyped_storage().data_ptr() for p in (model.a, model.b)}
    assert len(storages) == 1
    assert_all_close(taken(model), expected)


def test_a_term_that_is_a_view_of_a_parameter():
    # Its gradient is where the backward pass starts, and is added to.
    model = torch.nn.ParameterList([torch.full((1,), value).double() for value in (2.0, 3.0)])

    def loss_fn(x):
        return {"one": model[0].view(()), "other": model[1].view(()), "rows": x.mean() * model[0]}

    def of_one_number(x):
        return {name: term.sum() for name, term in loss_fn(x).items()}

    _, expected = uncut(of_one_number, X, model)
    vb.backward(
        lambda x: loss_fn(x) | {"rows": (x.mean() * model[0]).sum()},
        X,
        module=model,
        microbatch_size=2,
    )
    assert_all_close(taken(model), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_every_dtype(dtype):
    model, oracle = Two(dtype), Two()

    def loss_of(model):
        shift = model.a[None] + model.b[None]
        return lambda x: ((x.to(shift) + shift) * model.scale).square().mean()

    _, expected = uncut(loss_of(oracle), X, oracle)
    vb.backward(loss_of(model), X, module=model, microbatch_size=4)
    assert_all_close(taken(model), expected, 8 * torch.finfo(dtype).eps)


def test_sparse_gradients():
    # The gradients of two embeddings that are added up have the same memory too.
    model = torch.nn.ModuleList(
        torch.nn.Embedding(4, 2, sparse=True, dtype=torch.float64) for _ in range(2)
    )
    ids = torch.tensor([0, 1, 1, 3, 0, 2, 2])

    def loss_fn(ids):
        return (model[0](ids) + model[1](ids)).square().mean()

    _, expected = uncut(loss_fn, ids, model)
    for _ in range(2):
        vb.backward(loss_fn, ids, module=model, microbatch_size=2)
    assert model[0].weight.grad.is_sparse
    assert_all_close(taken(model), [2 * gradient for gradient in expected])


def test_a_grad_that_the_user_kept_is_added_to_once():
    model = Two()

    def loss_fn(x):
        return ((x + (model.a[None] + model.b[None])) * model.scale).square().mean()

    _, expected = uncut(loss_fn, X, model)
    kept = model.a.grad = torch.ones(3).double()
    vb.backward(loss_fn, X, module=model, microbatch_size=4)
    assert model.a.grad is kept
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()
    first, *others = taken(model)
    assert_all_close([first - 1, *others], expected)


def test_distributed_tensors():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model, plain = Two(), Two()
        for name in ("a", "b"):
            whole = distribute_tensor(getattr(plain, name).detach(), mesh, [Replicate()])
            setattr(model, name, torch.nn.Parameter(whole))

        def loss_of(model, of_x):
            return lambda x: (of_x(x) + (model.a[None] + model.b[None])).square().mean()

        def distributed(x):
            return DTensor.from_local(x, mesh, [Replicate()])

        _, expected = uncut(loss_of(plain, lambda x: x), X, plain)
        loss = vb.backward(loss_of(model, distributed), X, module=model, microbatch_size=4)
        assert isinstance(loss, DTensor)
        found = [p.grad.to_local().numpy() for p in (model.a, model.b)]
        assert_all_close(found, expected[:2])
    finally:
        dist.destroy_process_group()
