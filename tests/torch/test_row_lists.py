"""Lists of a batch are cut with its rows, whatever they hold; dataclasses count anew."""

import dataclasses

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.problems import taken, uncut
from torch import nn

import virtualbatch.torch as vb

torch.manual_seed(0)
X = torch.randn(4, 5, 2, dtype=torch.float64)
LENGTHS = [5, 4, 2, 1]


class Length:
    """Of the user's own."""

    def __init__(self, value):
        self.value = value


LISTS = {
    "numbers": (LENGTHS, lambda n: n),
    "a tuple": (tuple(LENGTHS), lambda n: n),
    "lists": ([[n] for n in LENGTHS], lambda n: n[0]),
    "texts": (["x" * n for n in LENGTHS], len),
    "mappings": ([{"length": n} for n in LENGTHS], lambda n: n["length"]),
    "objects": (list(map(Length, LENGTHS)), lambda n: n.value),
    "None among them": ([5, 4, 2, None], lambda n: n or 1),
}


def means(model, batch, length=lambda n: n):
    pairs = zip(batch["x"], batch["lengths"], strict=True)
    return torch.stack([model(row[: length(n)]).mean() for row, n in pairs])


@pytest.mark.parametrize("name", LISTS)
def test_a_list_as_long_as_the_batch_follows_the_rows(name):
    lengths, length = LISTS[name]
    model = nn.Linear(2, 1).double()

    def loss_fn(batch):
        assert batch["names"] == ["a", "b"]
        return means(model, batch, length).square().mean()

    batch = {"x": X, "lengths": lengths, "names": ["a", "b"]}
    expected = uncut(loss_fn, batch, model)[1]
    vb.backward(loss_fn, batch, module=model, microbatch_size=3)
    assert_all_close(taken(model), expected)


def test_aux_of_a_list_is_told_from_classes():
    # All micro-batches have two rows: the loss runs on three, whose lists must be as long.
    model = nn.Linear(2, 1).double()

    def loss_fn(batch):
        found = means(model, batch)
        return found.square().mean(), found

    batch = {"x": X, "lengths": LENGTHS}
    _, found = vb.backward(loss_fn, batch, module=model, microbatch_size=2, has_aux=True)
    assert_close(found, means(model, batch).detach())


def test_certify_chooses_rows_of_lists():
    model = nn.Linear(2, 1).double()
    found = vb.certify(
        lambda batch: means(model, batch).square().mean(),
        {"x": X, "lengths": LENGTHS},
        module=model,
        microbatch_size=2,
    )
    assert found.exact


def test_objects_that_belong_to_no_row_are_refused():
    model = nn.Linear(2, 1).double()
    batch = {"x": X, "other": [Length(1)]}
    with pytest.raises(TypeError, match=r"Got batch\['other'\] of type Length\. Pass its tensors"):
        vb.backward(lambda b: model(b["x"]).mean(), batch, module=model, microbatch_size=2)


@dataclasses.dataclass
class Counted:
    x: torch.Tensor
    n: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.n = len(self.x)


@dataclasses.dataclass
class Scaled:
    x: torch.Tensor

    def __post_init__(self):
        self.x.div_(self.x.abs().max())


def test_a_count_made_by_a_dataclass_is_that_of_the_micro_batch():
    model = nn.Linear(2, 1).double()
    rows = X[:, 0]
    vb.backward(lambda b: model(b.x).sum() / b.n, Counted(rows), module=model, microbatch_size=2)
    assert_all_close(taken(model), uncut(lambda x: model(x).mean(), rows, model)[1])


def test_a_dataclass_that_writes_to_its_tensors_is_refused_and_they_stay():
    model = nn.Linear(2, 1).double()
    batch = Scaled(X[:, 0].clone())
    before = batch.x.clone()
    with pytest.raises(ValueError, match=r"a constructor that writes to its arrays, for Scaled\."):
        vb.backward(lambda b: model(b.x).mean(), batch, module=model, microbatch_size=2)
    assert torch.equal(batch.x, before)
    assert model.weight.grad is None
