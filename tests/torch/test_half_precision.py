"""Half precision: the buffer is wide, the share enters there, and one rounding ends it."""

import copy
import gc

import pytest
import torch
from tests.oracle import assert_all_close, assert_close, tolerance
from tests.tiers import tiered
from tests.torch.problems import NAMES, problem, taken, uncut

import virtualbatch.torch as vb
from virtualbatch.torch._leaves import refuse_unheld_parameter

HALF = [torch.bfloat16, torch.float16]


class One(torch.nn.Module):
    """x times one parameter, which is 1."""

    def __init__(self, dtype):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones([], dtype=dtype))

    def forward(self, x):
        return (x * self.scale).mean()


def test_a_plain_loop_stalls():
    # Why the buffer is wide: without it the test below would see 0.25 and 0.5.
    for dtype, stalls in ((torch.bfloat16, 256), (torch.float16, 2048)):
        total = torch.zeros([], dtype=dtype)
        for _ in range(4096):
            total += 1
        assert total == stalls


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "microbatches", tiered([1024, 4096], [4096], "float16 stalls at 2048 only")
)
def test_unit_gradients_of_many_micro_batches(microbatches, dtype):
    # Peer case F12.
    model = One(dtype)
    x = torch.ones(microbatches, dtype=dtype)
    loss = vb.backward(model, x, module=model, microbatch_size=1)
    assert (float(loss), float(model.scale.grad)) == (1.0, 1.0)
    assert loss.dtype == model.scale.grad.dtype == dtype


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_sum_of_what_the_micro_batches_gave(name, dtype):
    # The oracle sums the same rounded gradients in float64, so only the sum is judged.
    loss_fn, weight, make_batch, module, _ = problem(name, dtype)
    batch = make_batch(11)
    pieces = [{k: v[a:b] for k, v in batch.items()} for a, b in [(0, 4), (4, 8), (8, 11)]]
    weights = [weight(p) if weight else len(p["x"]) for p in pieces]
    due = [0.0] * 4
    for piece, found in zip(pieces, weights, strict=True):
        terms = loss_fn(piece)
        terms = terms if isinstance(terms, dict) else {"loss": terms}
        for term, value in terms.items():
            one = found.get(term) if isinstance(found, dict) else found
            every = [w.get(term) if isinstance(w, dict) else w for w in weights]
            if one is None:
                one, every = len(piece["x"]), [len(p["x"]) for p in pieces]
            module.zero_grad()
            value.backward(retain_graph=True)
            share = float(one) / sum(map(float, every))
            due = [d + share * g for d, g in zip(due, taken(module), strict=True) if share]
    vb.backward(loss_fn, batch, module=module, microbatch_size=4, weight=weight)
    # Several terms go through one backward pass, which rounds their ratio and their sum.
    roundings = 4 if name.startswith("terms") else 1
    name_of = str(dtype).removeprefix("torch.")
    assert_all_close(taken(module), due, tolerance(name_of, 3 * roundings))


def test_one_rounding_at_the_end():
    # 2 ** 12 gradients of 1 + 2 ** -9: rounded each, they would be 1 in bfloat16.
    model = One(torch.bfloat16)
    x = torch.ones(3)
    x[0] += 2.0**-7
    # Mean over thirds: (1 + 2 ** -7 + 1 + 1) / 3 rounds to 1, with shares rounded first it is not.
    vb.backward(model, x.bfloat16(), module=model, microbatch_size=1)
    assert float(model.scale.grad) == 1.0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_narrow_loss_of_a_wide_parameter(dtype):
    # The share of a third would be off by 2e-3 in bfloat16, the same way for every micro-batch.
    model = One(torch.float32)
    loss = vb.backward(lambda x: model(x).to(dtype), torch.ones(3), module=model, microbatch_size=1)
    assert_close(model.scale.grad, 1.0, tolerance("float32", 3))
    assert loss.dtype == dtype
    assert model.scale.grad.dtype == torch.float32


def test_a_small_share_does_not_underflow():
    # 2 ** -12 of 2 ** -13 is below the smallest float16.
    model = One(torch.float16)
    window = vb.Window([torch.tensor([1.0]), torch.tensor([2.0**12 - 1])])
    tiny = torch.tensor(2.0**-13, dtype=torch.float16)
    vb.backward(lambda x: model(tiny), window, module=model, weight=lambda x: x[0])
    assert float(model.scale.grad) == 2.0**-13


def test_mixed_parameters_keep_their_dtypes():
    half, wide = torch.nn.Linear(3, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 1)
    oracle = copy.deepcopy(torch.nn.ModuleList([half, wide])).double()
    x = torch.randn(7, 3)
    _, expected = uncut(lambda x: oracle[1](oracle[0](x)).square().mean(), x.double(), oracle)
    vb.backward(
        lambda x: wide(half(x.bfloat16()).float()).square().mean(),
        x,
        module=[half, wide],
        microbatch_size=3,
    )
    assert half.weight.grad.dtype == torch.bfloat16
    assert wide.weight.grad.dtype == torch.float32
    found = taken(torch.nn.ModuleList([half, wide]))
    assert_all_close(found, expected, tolerance("bfloat16", 3))


def test_sparse_rows_in_half_precision():
    table = torch.nn.Embedding(3, 2, sparse=True, dtype=torch.bfloat16)
    ids = torch.zeros(1024, 1, dtype=torch.int64)
    for expected in (1.0, 2.0):
        vb.backward(lambda i: table(i).sum((1, 2)).mean(), ids, module=table, microbatch_size=1)
        assert table.weight.grad.is_sparse
        assert table.weight.grad.to_dense()[0].tolist() == [expected, expected]


@pytest.mark.parametrize("rows", [4, 2], ids=["two micro-batches", "one micro-batch"])
def test_every_parameter_must_be_in_a_module(rows):
    model, other = One(torch.bfloat16), One(torch.bfloat16)
    batch = torch.ones(rows, dtype=torch.bfloat16)

    def loss_fn(x):
        return model(x) * other.scale

    with pytest.raises(ValueError, match=r"module must hold every tensor .* shape \(\) and dtype"):
        vb.backward(loss_fn, batch, module=model, microbatch_size=2)
    assert model.scale.grad is other.scale.grad is None
    vb.backward(loss_fn, batch, module=[model, other], microbatch_size=2)
    assert float(other.scale.grad) == 1.0


INPUTS = torch.arange(8.0).reshape(4, 2)


def through_inputs(make):
    """Gradients of a bfloat16 layer behind a frozen one, whose output a function gets."""
    torch.manual_seed(2)
    frozen = torch.nn.Linear(2, 2, dtype=torch.bfloat16).requires_grad_(False)
    model = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    vb.backward(
        lambda x: model(make(frozen(x))).square().mean(),
        INPUTS.bfloat16(),
        module=[frozen, model],
        microbatch_size=2,
    )
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "make",
    [lambda x: x.requires_grad_(), lambda x: x.clone().requires_grad_()],
    ids=["in a hook, as PEFT does", "a clone"],
)
def test_inputs_may_be_made_to_require_gradients(make):
    assert all(map(torch.equal, through_inputs(make), through_inputs(lambda x: x)))


def test_inputs_in_a_cycle_that_nobody_reaches():
    def make(x):
        cycle = [x.clone().requires_grad_()]
        cycle.append(cycle)
        return cycle[0]

    gc.disable()
    try:
        found = through_inputs(make)
    finally:
        gc.enable()
    assert all(map(torch.equal, found, through_inputs(lambda x: x)))


def test_rows_that_require_gradients_are_given_none():
    # Theirs would lack the share of their micro-batch.
    model, x = One(torch.bfloat16), torch.ones(4, dtype=torch.bfloat16).requires_grad_()
    kept = x.grad = torch.ones_like(x)
    vb.backward(lambda x: model(x), x, module=model, microbatch_size=2)
    assert float(model.scale.grad) == 1.0
    assert x.grad is kept
    assert bool((kept == 1).all())


def test_a_tensor_that_outlives_its_micro_batch_is_trained_by_somebody():
    model, scale = One(torch.bfloat16), torch.ones([], dtype=torch.bfloat16, requires_grad=True)
    kept = scale.grad = torch.ones_like(scale)
    batch = torch.ones(4, dtype=torch.bfloat16)

    def loss_fn(x):
        return model(x) * scale

    with pytest.raises(ValueError, match=r"shape \(\) and dtype bfloat16 that is in no module"):
        vb.backward(loss_fn, batch, module=model, microbatch_size=2)
    assert model.scale.grad is None
    assert scale.grad is kept
    assert float(kept) == 1.0
    vb.backward(loss_fn, batch, module=[model, scale], microbatch_size=2)
    assert (float(model.scale.grad), float(scale.grad)) == (1.0, 2.0)
    # One micro-batch has the share 1, and is the ordinary computation.
    vb.backward(loss_fn, batch, module=model, microbatch_size=4)
    assert float(scale.grad) == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_that_no_module_holds_is_told_in_every_dtype(dtype):
    model, other = One(dtype), One(dtype)
    x = torch.ones(2, dtype=dtype)
    refuse_unheld_parameter([model(x).clone()], list(model.parameters()))
    with pytest.raises(ValueError, match="that is in no module"):
        refuse_unheld_parameter([model(x) * other.scale], list(model.parameters()))
