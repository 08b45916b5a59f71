"""Weights: read once before the first forward; what weighs nothing contributes nothing."""

import numpy as np
import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.problems import taken
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import virtualbatch.torch as vb

X = torch.as_tensor(np.random.default_rng(0).normal(size=(6, 3)))


class Refusing(TorchDispatchMode):
    """Refuses whatever would wait for a device: to hand over a value, or to take a copy."""

    READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in self.READS:
            raise RuntimeError(f"{function} reads a value")
        result = function(*arguments, **(options or {}))
        if function.overloadpacket is torch.ops.aten._to_copy:
            moved = result.device != arguments[0].device
            if moved and not (options or {}).get("non_blocking"):
                raise RuntimeError(f"{function} copies between devices")
        return result


class RefusingTables(TorchFunctionMode):
    """Refuses to make tensors of numbers on a device, a copy that `Refusing` does not see."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        device = torch.device((options or {}).get("device") or "cpu")
        if function is torch.tensor and device.type != "cpu":
            raise RuntimeError("torch.tensor copies numbers to a device")
        return function(*arguments, **(options or {}))


def test_the_refusing_mode_can_refuse():
    with pytest.raises(RuntimeError, match="reads a value"), Refusing():
        float(torch.ones(()))
    with pytest.raises(RuntimeError, match="copies between devices"), Refusing():
        torch.ones(()).to("meta")
    with pytest.raises(RuntimeError, match="copies numbers"), RefusingTables():
        torch.tensor([1.0], device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_value_is_read_after_the_weights(momentum, has_aux, dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1))
    model = model.to(dtype)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=dtype)
    mode = Refusing()
    forwards = []

    def loss_fn(batch):
        if not forwards:
            mode.__enter__()
        forwards.append(len(batch["x"]))
        output = model(batch["x"])[:, 0]
        loss = (output * batch["mask"]).sum() / batch["mask"].sum()
        terms = {"masked": loss, "rows": output.square().mean()}
        return (terms, {"output": output, "mean": output.mean()}) if has_aux else terms

    def weight(batch):
        assert not forwards
        return {"masked": batch["mask"].sum(), "rows": None}

    try:
        vb.backward(
            loss_fn,
            {"x": X.to(dtype), "mask": mask},
            module=model,
            microbatch_size=2,
            weight=weight,
            has_aux=has_aux,
        )
    finally:
        mode.__exit__(None, None, None)
    # With aux, one more run on shapes.
    assert forwards[:3] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("rows", [9, 8])
def test_a_device_is_not_waited_for(rows, has_aux, dtype):
    # Tensors of the meta device hold no data: whoever reads one fails.
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = model.to(dtype).to("meta")
    model[0].weight.grad = torch.empty_like(model[0].weight)
    x = torch.empty(rows, 3, device="meta", dtype=dtype)

    def loss_fn(x):
        output = model(x)
        terms = {"rows": output.mean(), "penalty": model[2].weight.square().sum()}
        return (terms, output.mean()) if has_aux else terms

    with Refusing(), RefusingTables():
        result = vb.backward(
            loss_fn,
            x,
            module=model,
            microbatch_size=3,
            weight=lambda x: {"rows": len(x), "penalty": None},
            has_aux=has_aux,
        )
    loss = result[0] if has_aux else result
    assert loss.device.type == model[2].weight.grad.device.type == "meta"


def test_the_weights_come_in_one_copy(monkeypatch):
    model = nn.Linear(3, 1).double()
    copies = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: copies.append(x.shape) or tolist(x))

    def loss_fn(x):
        return {"a": model(x).mean(), "b": model(x).square().mean(), "c": model.bias.sum()}

    def weight(x):
        return {"a": x.abs().sum(), "b": torch.tensor(len(x)), "c": None}

    vb.backward(loss_fn, X, module=model, microbatch_size=2, weight=weight)
    assert copies == [(6,)]
    vb.backward(loss_fn, X, module=model, microbatch_size=2)
    assert copies == [(6,)]


class Number:
    """A number of somebody else's."""

    def __float__(self):
        return 2.0


@pytest.mark.parametrize(
    "number",
    [
        2,
        2.0,
        np.float32(2),
        np.int64(2),
        torch.tensor(2),
        torch.tensor(2, dtype=torch.bfloat16),
        torch.tensor(2.0, requires_grad=True),
        Number(),
    ],
)
def test_weights_of_any_number_type(number):
    model = nn.Linear(3, 1).double()
    vb.backward(
        lambda x: model(x).mean(), X, module=model, microbatch_size=2, weight=lambda x: number
    )
    assert_close(model.bias.grad, [1.0])


def test_large_counts_are_not_rounded():
    model = nn.Linear(1, 1).double()
    counts = iter([2**53 - 1, 1])
    window = vb.Window([torch.zeros(1, 1).double(), torch.ones(1, 1).double()])
    vb.backward(
        lambda x: model(x).mean(), window, module=model, weight=lambda x: torch.tensor(next(counts))
    )
    assert float(model.weight.grad) == 2.0**-53


# Micro-batches without weight


def masked(model, fail=False):
    def loss_fn(batch):
        if fail and batch["mask"].sum() == 0:
            raise RuntimeError("it was run")
        return (model(batch["x"])[:, 0] * batch["mask"]).sum() / batch["mask"].sum()

    return loss_fn


def tokens(batch):
    return batch["mask"].sum()


MASK = torch.tensor([0.0, 0, 1, 1, 0, 0]).double()


def due():
    return [X[2:4].mean(0)[None], [1.0]]


def test_a_micro_batch_without_weight_is_not_run():
    model = nn.Linear(3, 1).double()
    loss = vb.backward(
        masked(model, fail=True),
        {"x": X, "mask": MASK},
        module=model,
        microbatch_size=2,
        weight=tokens,
    )
    assert_close(loss, model(X[2:4]).mean().detach())
    assert_all_close(taken(model), due())


def test_with_aux_its_forward_is_run():
    model = nn.Linear(3, 1).double()
    loss_fn = masked(model)
    loss, aux = vb.backward(
        lambda batch: (loss_fn(batch), batch["x"] * 1),
        {"x": X, "mask": MASK},
        module=model,
        microbatch_size=2,
        weight=tokens,
        has_aux=True,
    )
    assert loss.isfinite()
    assert_close(aux, X)
    assert_all_close(taken(model), due())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_an_empty_term_leaves_the_others(dtype):
    model = nn.Linear(3, 1).to(dtype)
    loss_fn = masked(model)
    loss = vb.backward(
        lambda batch: {"masked": loss_fn(batch), "rows": model(batch["x"]).mean()},
        {"x": X.to(dtype), "mask": MASK.to(dtype)},
        module=model,
        microbatch_size=2,
        weight=lambda batch: {"masked": tokens(batch), "rows": len(batch["x"])},
    )
    assert loss.isfinite()
    expected = [X[2:4].mean(0)[None] + X.mean(0)[None], [2.0]]
    assert_all_close(taken(model), expected, 1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_window_without_any_weight_has_zero_gradients(dtype, named):
    model = nn.Linear(3, 1).to(dtype)
    one = masked(model)
    batch = {"x": X.to(dtype), "mask": MASK.to(dtype) * 0}

    def loss_fn(batch):
        return {"a": one(batch), "b": one(batch)} if named else one(batch)

    def weight(batch):
        return {"a": tokens(batch), "b": 0} if named else tokens(batch)

    assert one(batch).isnan()
    for existing in (None, 3.0):
        model.bias.grad = None if existing is None else torch.full_like(model.bias, existing)
        loss = vb.backward(loss_fn, batch, module=model, microbatch_size=2, weight=weight)
        assert (float(loss), loss.dtype) == (0.0, dtype)
        assert_all_close(taken(model), [np.zeros((1, 3)), [existing or 0.0]])
