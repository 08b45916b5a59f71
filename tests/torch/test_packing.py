"""Packed windows in PyTorch: the gradient of the padded batch."""

from functools import partial

import numpy as np
import pytest
import torch
from tests import packed
from tests.oracle import EXACT, assert_all_close, tolerance
from tests.packed import MICROBATCH_TOKENS, SUMMANDS

import virtualbatch.torch as vb
from virtualbatch import pack

SIZES = [{}, {"round_to": 4}]


def problem(dtype):
    """(functions, module, batch) in a dtype of floats."""
    module = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.as_tensor(value))
            for name, value in packed.parameters(dtype).items()
        }
    )
    functions = packed.Functions(
        torch.einsum,
        lambda x: torch.softmax(x, -1),
        lambda table, ids: table[ids],
        lambda x: x.to(getattr(torch, dtype)),
    )
    batch = {name: torch.as_tensor(leaf) for name, leaf in packed.batch(dtype).items()}
    return functions, module, batch


def tokens(batch):
    return (batch["ids"] != 0).sum()


def gradients(loss, functions, module, batch, weight=None):
    """Those of a window, or of a whole batch at once."""
    module.zero_grad()
    bound = partial(loss, functions, module)
    if isinstance(batch, vb.Window):
        found = vb.backward(bound, batch, module=module, weight=weight)
    else:
        found = bound(batch)
        found.backward()
    return [found.detach().numpy(), *(p.grad.numpy().copy() for p in module.values())]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", EXACT), ("float32", None)])
@pytest.mark.parametrize(
    ("loss", "weight"), [(packed.token_loss, tokens), (packed.row_loss, None)], ids=["token", "row"]
)
def test_the_gradient_is_that_of_the_padded_batch(loss, weight, dtype, rtol, sizes):
    functions, module, batch = problem(dtype)
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS, **sizes)
    assert len(window) > 3
    found = gradients(loss, functions, module, window, weight)
    # The oracle is float64, whatever is under test.
    expected = gradients(loss, *problem("float64"))
    assert_all_close(found, expected, rtol or tolerance(dtype, SUMMANDS))


@pytest.mark.parametrize("loss", [packed.padding_loss, packed.coupled_loss])
def test_losses_that_are_not_safe_to_pack_differ(loss):
    functions, module, batch = problem("float64")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    expected = gradients(loss, functions, module, batch)
    with pytest.raises(AssertionError, match="off by"):
        assert_all_close(gradients(loss, functions, module, window), expected, 1e-3)


def test_certify_names_the_loss_that_couples_rows():
    functions, module, batch = problem("float64")
    loss = partial(packed.coupled_loss, functions, module)
    found = vb.certify(loss, batch, module=module, microbatch_size=6)
    assert "coupled_rows" in [finding.kind for finding in found.findings]


def test_tensors_stay_tensors_on_their_device_and_lengths_may_be_one():
    _, _, batch = problem("float32")
    batch["text"] = [f"row {row}" for row in range(packed.ROWS)]
    lengths = (batch["ids"] != 0).sum(1)
    window = pack(batch, lengths, microbatch_tokens=MICROBATCH_TOKENS)
    for found in window:
        assert all(isinstance(found[name], torch.Tensor) for name in ("ids", "targets", "row"))
        assert found["ids"].dtype is torch.int32
        assert found["ids"].shape == found["targets"].shape
        assert found["text"] == [f"row {int(row)}" for row in found["row"]]
    meta = pack(torch.ones(2, 3, device="meta"), [1, 3], microbatch_tokens=3)
    assert [(x.device.type, tuple(x.shape)) for x in meta] == [("meta", (1, 3)), ("meta", (1, 1))]


@pytest.mark.parametrize("layout", ["sparse", "strided", "jagged"])
def test_arrays_that_are_not_dense_are_refused(layout):
    if layout == "sparse":
        leaf = torch.eye(2).to_sparse()
    else:
        rows = [torch.ones(1), torch.ones(2)]
        leaf = torch.nested.nested_tensor(rows, layout=getattr(torch, layout))
    with pytest.raises(TypeError, match=r"pack sorts dense arrays .* Got batch\['x'\] of type"):
        pack({"ids": torch.ones(2, 4).int(), "x": leaf}, [1, 2], microbatch_tokens=4)


def test_noise_statistics_are_refused_before_anything_runs():
    functions, module, batch = problem("float32")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    calls = []

    def loss(batch):
        calls.append(batch)
        return packed.row_loss(functions, module, batch)

    with pytest.raises(ValueError, match="Noise statistics need micro-batches of random rows"):
        vb.backward(loss, window, module=module, stats=True)
    assert not calls
    assert all(parameter.grad is None for parameter in module.values())


def test_rows_of_aux_come_in_the_order_of_the_window():
    functions, module, batch = problem("float64")
    window = pack(batch, packed.lengths(), microbatch_tokens=MICROBATCH_TOKENS)
    _, row = vb.backward(
        lambda batch: (packed.row_loss(functions, module, batch), batch["row"]),
        window,
        module=module,
        has_aux=True,
    )
    order = np.argsort(-packed.lengths(), kind="stable")
    np.testing.assert_array_equal(row.numpy(), order)
