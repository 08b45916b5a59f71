"""Batches of any structure, cut by rows, and copied to a device when they are needed."""

import collections
import dataclasses
from types import MappingProxyType

import numpy as np
import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.problems import taken, uncut
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import virtualbatch.torch as vb

X = torch.as_tensor(np.random.default_rng(1).normal(size=(10, 3)))
Y = torch.as_tensor(np.random.default_rng(2).normal(size=(10, 1)))
Row = collections.namedtuple("Row", "image label")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor
    size: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass(slots=True)
class Slots:
    x: torch.Tensor
    y: torch.Tensor


class Encoding(collections.UserDict):
    """As tokenizers return."""

    def __init__(self, data, name):
        super().__init__(data)
        self.name = name


BATCHES = {
    "tuple": ((X, Y), lambda b: b),
    "list": ([X, Y], lambda b: b),
    "dict": ({"y": Y, "x": X}, lambda b: (b["x"], b["y"])),
    "ordered": (collections.OrderedDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "default": (collections.defaultdict(list, x=X, y=Y), lambda b: (b["x"], b["y"])),
    "user dict": (Encoding({"x": X, "y": Y}, "name"), lambda b: (b["x"], b["y"])),
    "namedtuple": (Row(X, Y), lambda b: (b.image, b.label)),
    "frozen dataclass": (Frozen(X, Y), lambda b: (b.x, b.y)),
    "slots": (Slots(X, Y), lambda b: (b.x, b.y)),
    "nested": ({"in": [Slots(X, X)], "out": (Y,)}, lambda b: (b["in"][0].x, b["out"][0])),
    "one tensor": (torch.cat([X, Y], 1), lambda b: (b[:, :3], b[:, 3:])),
    "other leaves": (
        {"x": X, "y": Y, "none": None, "flag": True, "text": "mse", "three": 3, "empty": []},
        lambda b: (b["x"], b["y"] if b["flag"] and b["none"] is None else 0 * b["y"]),
    ),
}


@pytest.mark.parametrize("structure", BATCHES)
def test_batches_of_any_structure(structure):
    batch, take = BATCHES[structure]
    model = nn.Linear(3, 1).double()
    seen = []

    def loss_fn(batch):
        seen.append(batch)
        x, y = take(batch)
        return (model(x).tanh() - y).square().mean()

    expected_loss, expected = uncut(loss_fn, batch, model)
    loss = vb.backward(loss_fn, batch, module=model, microbatch_size=4)
    assert_close(loss, expected_loss)
    assert_all_close(taken(model), expected)
    assert {type(found) for found in seen} == {type(batch)}
    assert [len(take(found)[0]) for found in seen] == [10, 4, 3, 3]
    if isinstance(batch, Encoding):
        assert {found.name for found in seen} == {"name"}
    assert take(batch)[0].shape[0] == 10


def test_a_mapping_that_cannot_be_written_becomes_a_dict():
    model = nn.Linear(3, 1).double()
    seen = []

    def loss_fn(batch):
        seen.append(type(batch))
        return model(batch["x"]).mean()

    vb.backward(loss_fn, MappingProxyType({"x": X}), module=model, microbatch_size=5)
    assert seen == [dict, dict]


@pytest.mark.parametrize("texts", [list, tuple])
def test_texts_of_the_rows_are_cut(texts):
    # PyTorch's loaders give one text per row as a tuple or a list.
    model = nn.Linear(3, 1).double()
    words = texts(str(i) for i in range(10))
    seen = []

    def loss_fn(batch):
        assert len(batch["names"]) == 2
        seen.append(batch["words"])
        return model(batch["x"]).mean()

    batch = {"x": X, "words": words, "names": ["of", "columns"]}
    vb.backward(loss_fn, batch, module=model, microbatch_size=4)
    assert [len(found) for found in seen] == [4, 3, 3]
    assert sum(seen, texts()) == words


def test_batches_of_a_loader():
    model = nn.Linear(3, 1).double()
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)

    def loss_fn(batch):
        x, y = batch
        return (model(x) - y).square().mean()

    for batch in loader:
        assert isinstance(batch, list)
        expected = uncut(loss_fn, batch, model)[1]
        vb.backward(loss_fn, batch, module=model, microbatch_size=3)
        assert_all_close(taken(model), expected)
    # The same loader as a stream of micro-batches; the last window is one of 2 rows.
    starts = [0, 8]
    for start, window in zip(starts, vb.windows(loader, accumulation_steps=2), strict=True):
        rows = slice(start, start + 8)
        expected = uncut(loss_fn, (X[rows], Y[rows]), model)[1]
        vb.backward(loss_fn, window, module=model)
        assert_all_close(taken(model), expected)


def test_a_loss_function_may_take_its_micro_batch_apart():
    model = nn.Linear(3, 1).double()
    batch = {"x": X, "y": Y}

    def loss_fn(batch):
        y = batch.pop("y")
        return (model(**{"input": batch.pop("x")}) - y).square().mean()

    def weight(batch):
        return batch.pop("x").shape[0]

    expected = uncut(loss_fn, dict(batch), model)[1]
    vb.backward(loss_fn, batch, module=model, microbatch_size=4, weight=weight)
    assert_all_close(taken(model), expected)
    assert list(batch) == ["x", "y"]


def test_rows_are_not_copied():
    model = nn.Linear(3, 1).double()
    seen = []

    def loss_fn(x):
        seen.append(x.data_ptr())
        return model(x).mean()

    vb.backward(loss_fn, X, module=model, microbatch_size=5)
    assert seen == [X.data_ptr(), X[5:].data_ptr()]


class OnDevice(torch.nn.Module):
    """A model on a device other than the host: the meta device, which holds no data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1, device="meta", dtype=torch.float64)


def test_micro_batches_are_copied_to_the_device_of_the_model_one_at_a_time(monkeypatch):
    model = OnDevice()
    events = []
    to = torch.Tensor.to

    def copied(tensor, *arguments, **options):
        if "non_blocking" in options:
            events.append(("copy", len(tensor), options["non_blocking"]))
        return to(tensor, *arguments, **options)

    def loss_fn(batch):
        assert batch["x"].device.type == batch["y"].device.type == "meta"
        events.append(("loss", len(batch["x"])))
        return (model.layer(batch["x"]) - batch["y"]).square().mean()

    def weight(batch):
        # Where the batch is: reading it does not wait for the device.
        assert batch["x"].device.type == "cpu"
        return batch["x"].abs().sum()

    monkeypatch.setattr(torch.Tensor, "to", copied)
    y = to(Y, "meta")
    loss = vb.backward(loss_fn, {"x": X, "y": y}, module=model, microbatch_size=5, weight=weight)
    monkeypatch.undo()
    assert events == [("copy", 5, False), ("loss", 5), ("copy", 5, False), ("loss", 5)]
    assert loss.device.type == model.layer.weight.grad.device.type == "meta"


def test_aux_of_micro_batches_that_are_copied():
    # Two rows and two classes: telling them apart takes a run on shapes, on the device.
    layer = nn.Linear(3, 2, device="meta", dtype=torch.float64)
    seen = []

    def loss_fn(x):
        seen.append((len(x), x.device.type))
        logits = layer(x)
        return logits.mean(), (logits, logits.mean(0))

    _, (logits, per_class) = vb.backward(loss_fn, X, module=layer, microbatch_size=2, has_aux=True)
    assert (logits.shape, per_class.shape) == ((10, 2), (2,))
    assert seen == [(2, "meta")] * 5 + [(3, "meta")]


def test_a_model_on_several_devices_moves_its_inputs_itself():
    model = nn.ModuleList([nn.Linear(3, 1, device="meta"), nn.Linear(3, 1).double()])
    vb.backward(lambda x: model[1](x).mean(), X, module=model, microbatch_size=5)
    assert model[0].weight.grad is None
