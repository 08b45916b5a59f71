"""Windows whose rows cannot be told: with a weight their micro-batches are taken as they are."""

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.problems import taken, uncut
from torch import nn

import virtualbatch.torch as vb

torch.manual_seed(0)
SIZES = (5, 3)
X = [torch.randn(n, 2, dtype=torch.float64) for n in SIZES]


class Graph:
    """Of the user's own."""

    def __init__(self, x):
        self.x = x


def packed(x):
    return nn.utils.rnn.pack_sequence([x])


# way -> (micro-batch of some rows, the rows in it)
WAYS = {
    "edges": (lambda x: {"x": x, "edge": torch.zeros(2, len(x) + 2)}, lambda b: b["x"]),
    "samples": (
        lambda x: [{"box": row, "label": torch.tensor(1)} for row in x],
        lambda b: torch.stack([s["box"] for s in b]),
    ),
    "a scalar": (lambda x: {"x": x, "grid": torch.tensor(7)}, lambda b: b["x"]),
    "objects": (Graph, lambda b: b.x),
    "packed": (packed, lambda b: b.data),
    "nested": (
        lambda x: torch.nested.nested_tensor(list(x.split(2)), layout=torch.jagged),
        lambda b: b.values(),
    ),
    "sparse": (lambda x: x.to_sparse(), lambda b: b.to_dense()),
    "other structures": (
        lambda x: (x, None) if len(x) == 3 else {"x": x, "e": X[1]},
        lambda b: b[0] if isinstance(b, tuple) else b["x"],
    ),
}


@pytest.fixture
def model():
    return nn.Linear(2, 1).double()


def mean(model, x):
    return model(x).tanh().mean()


@pytest.mark.parametrize("way", WAYS)
def test_with_a_weight_it_is_the_whole_batch(way, model):
    make, rows = WAYS[way]
    window = vb.Window(map(make, X))
    loss = vb.backward(
        lambda b: mean(model, rows(b)), window, module=model, weight=lambda b: len(rows(b))
    )
    found = taken(model)
    expected_loss, expected = uncut(lambda x: mean(model, x), torch.cat(X), model)
    assert_close(loss, expected_loss)
    assert_all_close(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_weight_it_is_refused_and_the_weight_named(way, model):
    make, rows = WAYS[way]
    window = vb.Window(map(make, X))
    with pytest.raises(
        (TypeError, ValueError), match=r"Or pass weight=.* See docs/guides/rows\.md\."
    ):
        vb.backward(lambda b: mean(model, rows(b)), window, module=model)
    assert model.weight.grad is None


def edges():
    return vb.Window(map(WAYS["edges"][0], X))


def test_aux_is_concatenated_where_it_has_an_axis_and_else_weighted(model):
    def loss_fn(batch):
        found = model(batch["x"])
        return found.mean(), {"nodes": found, "mean": found.mean(), "count": len(found)}

    _, aux = vb.backward(loss_fn, edges(), module=model, weight=lambda b: len(b["x"]), has_aux=True)
    whole = model(torch.cat(X)).detach()
    assert_close(aux["nodes"], whole)
    assert_close(aux["mean"], whole.mean())
    assert aux["count"] == 8


def test_a_term_that_does_not_depend_on_the_rows_counts_once(model):
    def loss_fn(x):
        return {"mean": mean(model, x), "penalty": model.weight.square().sum()}

    vb.backward(
        lambda b: loss_fn(b["x"]),
        edges(),
        module=model,
        weight=lambda b: {"mean": len(b["x"]), "penalty": None},
    )
    found = taken(model)
    assert_all_close(found, uncut(lambda x: sum(loss_fn(x).values()), torch.cat(X), model)[1])


def test_statistics_count_what_the_weight_counts(model):
    def stats(window, weight=None):
        return vb.backward(
            lambda b: mean(model, b["x"]), window, module=model, weight=weight, stats=True
        )[1]

    given = stats(edges(), lambda b: len(b["x"]))
    by_rows = stats(vb.Window({"x": x} for x in X))
    assert given.rows == by_rows.rows == 8
    assert_close(given.mean_square, by_rows.mean_square)


def test_statistics_of_several_terms_are_refused(model):
    with pytest.raises(ValueError, match=r"one weight that counts.*several terms\. Leave stats"):
        vb.backward(
            lambda b: {"a": mean(model, b["x"]), "b": model.weight.sum()},
            edges(),
            module=model,
            weight=lambda b: {"a": len(b["x"]), "b": None},
            stats=True,
        )


def test_rows_that_one_micro_batch_seems_to_have_are_not_cut(model):
    # Two nodes and two rows of edges look like two rows; three nodes do not.
    window = vb.Window([{"x": x, "edge": torch.zeros(2, 7)} for x in (X[0][:2], X[1])])
    calls = []

    def loss_fn(batch):
        calls.append(len(batch["x"]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return mean(model, batch["x"])

    with pytest.raises(torch.OutOfMemoryError) as caught:
        vb.backward(loss_fn, window, module=model, weight=lambda b: len(b["x"]))
    assert calls == [2, 3]
    assert "cannot be cut smaller. Make smaller ones." in caught.value.__notes__[0]
    assert model.weight.grad is None


def test_tensors_that_can_be_found_go_to_the_device_of_the_model():
    layer = nn.Linear(2, 1, device="meta", dtype=torch.float64)
    seen = []

    def loss_fn(batch):
        seen.append({batch["x"].device.type, batch["packed"].data.device.type})
        return layer(batch["x"]).mean()

    window = vb.Window({"x": x, "packed": packed(x), "own": Graph(x)} for x in X)
    vb.backward(loss_fn, window, module=layer, weight=lambda b: len(b["x"]))
    assert seen == [{"meta"}] * 2
