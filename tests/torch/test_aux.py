"""What a loss gives beside itself: rows concatenated, means averaged, integers summed."""

import pytest
import torch
from tests.oracle import assert_close
from torch import nn

import virtualbatch.torch as vb

CLASSES = 4
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model():
    return nn.Sequential(nn.Linear(3, CLASSES), nn.BatchNorm1d(CLASSES), nn.Dropout(0.0)).double()


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (11, 4), (12, 12)])
def test_the_aux_of_the_whole_batch(rows, size):
    module = model().eval()
    x = X[:rows]

    def loss_fn(x):
        logits = module(x)
        aux = {
            "logits": logits,
            "per class": logits.mean(0),
            "votes": logits.argmax(1).bincount(minlength=CLASSES),
            "mean": logits.mean(),
            "rows": len(x),
            "half": [logits.mean().to(torch.bfloat16), 0.5],
            "none": None,
            "flags": logits[:, 0] > 0,
        }
        return logits.square().mean(), aux

    if (rows, size) == (12, 4):
        # Rows and classes look alike, and bincount, which depends on values, has no shape.
        with pytest.raises(TypeError, match=r"must run on shapes alone.*Got \w+ with 5 rows"):
            vb.backward(loss_fn, x, module=module, microbatch_size=size, has_aux=True)
        return
    loss, aux = vb.backward(loss_fn, x, module=module, microbatch_size=size, has_aux=True)
    expected_loss, expected = loss_fn(x)
    assert_close(loss, expected_loss.detach())
    assert list(aux) == list(expected)
    assert_close(aux["logits"], expected["logits"].detach())
    assert_close(aux["per class"], expected["per class"].detach())
    assert_close(aux["mean"], expected["mean"].detach())
    assert aux["votes"].tolist() == expected["votes"].tolist()
    assert (aux["rows"], aux["none"], aux["half"][1]) == (rows, None, 0.5)
    assert aux["half"][0].dtype == torch.bfloat16
    assert aux["flags"].tolist() == expected["flags"].tolist()
    assert not aux["logits"].requires_grad


@pytest.mark.parametrize("momentum", [0.1, None])
def test_classes_are_not_taken_for_rows(momentum):
    # Four rows and four classes: the shapes of one micro-batch cannot tell.
    module = model()
    module[1].momentum = momentum
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        logits = module(x)
        return logits.square().mean(), (logits, logits.abs().mean(0))

    for _ in range(2):
        _, (logits, per_class) = vb.backward(
            loss_fn, X, module=module, microbatch_size=4, has_aux=True
        )
        assert logits.shape == (12, CLASSES)
        assert per_class.shape == (CLASSES,)
        assert_close(per_class, logits.abs().mean(0))
    # Asked once, and not on data.
    assert calls == [4, 4, 4, 5, 4, 4, 4]
    assert module[1].num_batches_tracked == 2
    assert all(buffer.isfinite().all() for buffer in module.buffers())


def test_shapes_leave_the_generator_alone():
    module = nn.Linear(3, 2).double()

    def loss_fn(x):
        output = nn.functional.dropout(module(x))
        return output.mean(), output

    torch.manual_seed(3)
    vb.backward(loss_fn, X, module=module, microbatch_size=6, has_aux=True)
    after = torch.rand(3)
    torch.manual_seed(3)
    for part in X.split(6):
        loss_fn(part)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("leaf", [True, torch.tensor(True), "text"])
def test_leaves_that_cannot_be_merged(leaf):
    module = nn.Linear(3, 1).double()
    with pytest.raises(TypeError, match=r"one entry per row, or be a number.*Cast it"):
        vb.backward(
            lambda x: (module(x).mean(), leaf), X, module=module, microbatch_size=6, has_aux=True
        )


@pytest.mark.parametrize(
    "given", [[{"a": 1}, {"b": 1}], [1.0, None], [None, 1.0], [1, 1.0]], ids=str
)
def test_structures_that_differ(given):
    module = nn.Linear(3, 1).double()
    results = iter(given)
    with pytest.raises(ValueError, match="aux must have the same structure"):
        vb.backward(
            lambda x: (module(x).mean(), next(results)),
            X,
            module=module,
            microbatch_size=6,
            has_aux=True,
        )
