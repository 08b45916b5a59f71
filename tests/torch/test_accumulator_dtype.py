"""Sums in bfloat16: half the memory, no bias, and an error that is as large as stated."""

import pytest
import torch
from tests.oracle import assert_close, tolerance
from tests.torch import ranks
from tests.torch.replicated import by_backward, by_loss
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb
from virtualbatch.torch._plan.peak import peak_bytes
from virtualbatch.torch._rounding import StochasticRounding

BF16 = {"accumulator_dtype": "bfloat16", "microbatch_size": 1}
BOTH = pytest.mark.parametrize("gradients", [by_backward, by_loss])


class Weights(nn.Module):
    """Parameters whose gradient is the mean of the rows."""

    def __init__(self, count, dtype=torch.bfloat16):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(count, dtype=dtype))
        # Of the smallest parameters gradients stay in `.grad`, so that large ones need not.
        self.small = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, rows):
        return (rows * self.weights).sum(1).float().mean()


def ones(rows, count):
    return torch.ones(rows, count, dtype=torch.bfloat16)


def noise(rows, count):
    return (1 + 0.5 * torch.randn(rows, count)).bfloat16()


@BOTH
def test_sums_of_1024_micro_batches_do_not_stall(gradients):
    # To the nearest, the sum of 1,024 times 1/1024 is 1/4.
    total = torch.zeros([], dtype=torch.bfloat16)
    for _ in range(1024):
        total += 2.0**-10
    assert total == 0.25
    model = Weights(5000)
    gradients(model, ones(1024, 5000), module=model, check=False, **BF16)
    found = model.weights.grad
    assert found.dtype == torch.bfloat16
    # The error of one is 4 %, so that of the mean is 0.06 %: here are four times as much.
    assert abs(float(found.double().mean()) - 1) < 4 * 0.04 / 5000**0.5
    assert 0.02 < float(found.double().std()) < 0.06


@BOTH
@pytest.mark.parametrize(("count", "error"), [(2, 0.003), (8, 0.005), (64, 0.013)])
def test_the_error_is_as_large_as_stated(gradients, count, error):
    torch.manual_seed(1)
    rows, model = noise(count, 20_000), Weights(20_000)
    exact = rows.double().mean(0)
    gradients(model, rows, module=model, check=False, **BF16)
    off = model.weights.grad.double() - exact
    assert error / 3 < float(off.norm() / exact.norm()) < error
    assert abs(float(off.mean() / exact.mean())) < 4 * error / 20_000**0.5


def test_the_mean_over_windows_tends_to_the_exact_sum():
    # Each window draws other numbers: 256 of them leave a sixteenth of the error of one.
    torch.manual_seed(2)
    rows, model = noise(7, 300), Weights(300)
    rows[:, ::3] *= -1
    exact = rows.double().mean(0)
    total, errors = torch.zeros(300, dtype=torch.float64), []
    for _ in range(256):
        model.zero_grad()
        vb.backward(model, rows, module=model, check=False, **BF16)
        total += model.weights.grad.double()
        errors.append(float((model.weights.grad.double() - exact).norm()))
    error = float((total / 256 - exact).norm())
    due = (sum(e * e for e in errors) / len(errors)) ** 0.5 / 16
    assert 0.7 * due < error < 1.3 * due


def test_what_bfloat16_can_hold_is_not_rounded():
    # So is a window of one micro-batch.
    given = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-133, float("inf"), float("-inf")])
    found = StochasticRounding(1).first(given.bfloat16(), 1.0)
    assert found.float().tolist() == given.tolist()


def test_what_is_not_a_number_stays_so():
    # Carries would make 0 of the first two, and an infinity of the third.
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F810000, -0x7F0000], dtype=torch.int32)
    given = bits.view(torch.float32).repeat(100)
    assert bool(given.isnan().all())
    rounding = StochasticRounding(1)
    total = rounding.first(torch.zeros(400, dtype=torch.bfloat16), 1.0)
    rounding.add(total, given, 1.0)
    assert bool(total.isnan().all())


def test_gradients_of_any_strides_and_more_than_a_block():
    count = 2**22 + 3
    rounding = StochasticRounding(1)
    whole = torch.ones(count, dtype=torch.bfloat16)
    total = rounding.first(whole, 0.5)
    rounding.add(total, whole[:1].expand(count), 0.25)
    assert bool((total == 0.75).all())
    square = torch.arange(12.0).reshape(3, 4).bfloat16()
    total = rounding.first(square, 1.0)
    rounding.add(total, square.t().contiguous().t(), 1.0)
    assert torch.equal(total, 2 * square)


@BOTH
def test_the_same_program_draws_the_same_numbers_and_no_others_move(gradients):
    torch.manual_seed(3)
    rows = noise(9, 500)
    before = torch.get_rng_state()
    found = []
    for _ in range(2):
        model = Weights(500)
        for _ in range(2):
            model.zero_grad()
            gradients(model, rows, module=model, check=False, **BF16)
            found.append(model.weights.grad)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


LAYERS, WIDTH = 12, 256


@pytest.mark.parametrize("gradients", [by_backward, by_loss])
def test_a_window_holds_half_of_what_float32_sums_need(gradients):
    torch.manual_seed(4)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    module = nn.Sequential(*layers).bfloat16()
    rows = torch.randn(4, WIDTH).bfloat16()
    peaks = {}
    for dtype in ("float32", "bfloat16"):
        module.zero_grad()

        def window(dtype=dtype):
            gradients(
                lambda x: module(x).float().square().mean(),
                rows,
                module=module,
                microbatch_size=2,
                check=False,
                accumulator_dtype=dtype,
            )

        peaks[dtype] = peak_bytes(window) / (LAYERS * WIDTH**2)
    # 2 for the sums; a layer at a time is widened, which takes 14 for a twelfth of all.
    assert 2 < peaks["bfloat16"] < 2 + 14 / LAYERS
    assert peaks["float32"] > 6


def test_the_sums_are_handed_over_without_a_copy():
    model, places = Weights(5000), []
    model.weights.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    by_loss(model, ones(4, 5000), module=model, check=False, **BF16)
    assert places == [model.weights.grad.data_ptr()]


def test_what_arrives_in_the_backward_pass_is_rounded_with_the_sum_only():
    # A third in bfloat16 is off by 1e-3, the same way for every number.
    model = Weights(5000)
    rows = (torch.arange(5000) % 128 + 128.0).bfloat16().repeat(2, 1)
    (vb.loss(model, rows, module=model, check=False, **BF16) / 3).backward()
    exact = rows[0].double() / 3
    off = (model.weights.grad.double() - exact) / exact
    assert abs(float(off.mean())) < 2e-4
    assert float(off.abs().max()) <= 2.0**-8


def test_other_parameters_keep_their_sums():
    half, wide, narrow = Weights(3), Weights(3, torch.float32), Weights(3, torch.float16)
    # A share of 2 ** -10 is exact, so float32 sums are; to stay so they need 11 bits.
    rows = torch.full((1024, 3), 1.0)
    vb.backward(
        lambda x: half(x.bfloat16()) + wide(x) + narrow(x.half()),
        rows,
        module=[half, wide, narrow],
        check=False,
        **BF16,
    )
    assert half.weights.grad.dtype == torch.bfloat16
    assert wide.weights.grad.dtype == torch.float32
    assert wide.weights.grad.tolist() == [1.0] * 3
    assert narrow.weights.grad.tolist() == [1.0] * 3


def test_sparse_gradients_keep_float32_sums():
    table = nn.Embedding(3, 2, sparse=True, dtype=torch.bfloat16)
    ids = torch.zeros(1024, 1, dtype=torch.int64)
    by_backward(lambda i: table(i).sum((1, 2)).mean(), ids, module=table, check=False, **BF16)
    assert table.weight.grad.is_sparse
    assert table.weight.grad.to_dense()[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dense_first", [True, False])
def test_a_table_with_dense_and_sparse_gradients(dense_first):
    table = nn.Embedding(3000, 2, sparse=True, dtype=torch.bfloat16)
    ids = torch.tensor([[0], [1]])
    dense = 0 if dense_first else 1

    def loss_fn(i):
        return (table.weight if int(i) == dense else table(i)).float().sum()

    by_backward(loss_fn, ids, module=table, check=False, **BF16)
    found = table.weight.grad.to_dense()
    expected = torch.full((3000, 2), 0.5)
    expected[1 - dense] += 0.5
    assert torch.equal(found.float(), expected)


def test_statistics_are_those_of_the_rounded_sums():
    torch.manual_seed(8)
    rows, model = noise(8, 5000), Weights(5000)
    _, stats = vb.backward(model, rows, module=model, stats=True, check=False, **BF16)
    of_rows = rows.double().square().sum(1).mean()
    assert_close(stats.mean_square, of_rows, tolerance("float32", 8))
    of_sums = model.weights.grad.double().square().sum()
    assert_close(stats.square, of_sums, tolerance("float32", 8))


def test_somebody_elses_backward_pass_sees_the_gradients_of_its_micro_batch():
    model, seen = Weights(5000), []

    def backward_fn(loss):
        loss.backward()
        seen.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))

    vb.backward(model, ones(4, 5000), module=model, backward_fn=backward_fn, check=False, **BF16)
    assert all(norm > 0 for norm in seen)
    assert len(seen) == 4


def test_an_inner_backward_is_still_refused():
    model = Weights(5000)

    def loss_fn(rows):
        model(rows).backward()
        return model(rows)

    with pytest.raises(ValueError, match=r"must leave \.grad alone"):
        vb.backward(loss_fn, ones(4, 5000), module=model, check=False, **BF16)
    assert model.weights.grad is None


@BOTH
def test_scaled_losses(gradients):
    model, scaler = Weights(5000), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    if gradients is by_loss:
        loss = vb.loss(model, ones(4, 5000), module=model, scaler=scaler, check=False, **BF16)
        scaler.scale(loss).backward()
    else:
        run = lambda loss: scaler.scale(loss).backward()  # noqa: E731
        vb.backward(model, ones(4, 5000), module=model, backward_fn=run, check=False, **BF16)
    assert bool((model.weights.grad == 2.0**10).all())


@BOTH
@pytest.mark.proves_itself
def test_the_first_window_proves_itself_in_float32(gradients):
    torch.manual_seed(5)
    model = Weights(50)
    gradients(model, noise(64, 50), module=model, **BF16)
    assert model.weights.grad is not None
    with pytest.raises(ValueError, match="micro-batch"):
        gradients(lambda x: model(x) * len(x), noise(64, 50), module=model, **BF16)


def test_a_second_attempt_draws_the_same_numbers():
    torch.manual_seed(6)
    rows, found = noise(8, 500), []
    for fails in (True, False):
        model = Weights(500)

        def loss_fn(x, model=model, fails=fails):
            if fails and len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(x)

        size = 4 if fails else 2
        vb.backward(
            loss_fn,
            rows,
            module=model,
            microbatch_size=size,
            check=False,
            accumulator_dtype="bfloat16",
        )
        found.append(model.weights.grad)
    assert torch.equal(*found)


def test_after_an_error_everything_is_as_before():
    model = Weights(5000)
    kept = model.weights.grad = torch.ones(5000, dtype=torch.bfloat16)
    calls = []

    def loss_fn(rows):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return model(rows)

    with pytest.raises(ZeroDivisionError):
        vb.backward(loss_fn, ones(4, 5000), module=model, check=False, **BF16)
    assert model.weights.grad is kept
    assert bool((kept == 1).all())
    model(ones(1, 5000)).backward()
    assert bool((kept == 2).all())


def test_a_planned_size_and_a_captured_loss():
    model = Weights(5000)
    rows, before = ones(8, 5000), torch.get_rng_state()
    vb.backward(
        model, rows, module=model, microbatch_size="auto", accumulator_dtype="bfloat16", check=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    model.zero_grad()
    vb.backward(vb.captured(model), rows, module=model, check=False, **BF16)
    assert bool((model.weights.grad == 1).all())


@pytest.mark.parametrize("call", [vb.backward, vb.loss])
@pytest.mark.parametrize(
    ("dtype", "name", "text"),
    [
        (torch.bfloat16, "float16", 'must be "float32" or "bfloat16"'),
        (torch.bfloat16, torch.bfloat16, "by name"),
        (torch.float32, "bfloat16", "Got float32 only"),
        (torch.float16, "bfloat16", "Got float16 only"),
    ],
)
def test_what_is_refused(call, dtype, name, text):
    model = Weights(3, dtype)
    with pytest.raises(ValueError, match=text):
        call(
            model, torch.ones(4, 3).to(dtype), module=model, microbatch_size=1,
            accumulator_dtype=name,
        )  # fmt: skip


def test_an_evaluation_sums_nothing():
    model = Weights(3).requires_grad_(False)
    with torch.no_grad():
        found = vb.loss(model, ones(4, 3), module=model, **BF16)
    assert float(found) == 3.0


def over_ranks(rank, world, gradients):
    torch.manual_seed(7)
    rows, model = noise(12, 5000), DistributedDataParallel(Weights(5000))
    found = []
    for _ in range(2):
        model.zero_grad()
        own = rows[:5] if rank == 0 else rows[5:]
        gradients(model, own, module=model, check=False, **BF16)
        found.append(model.module.weights.grad.clone())
    return found, rows.double().mean(0)


@BOTH
def test_two_ranks_get_the_same_sum(gradients):
    (first, exact), (second, _) = ranks.run(over_ranks, 2, gradients)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert 1e-3 < float((a.double() - exact).norm() / exact.norm()) < 8e-3
    assert not torch.equal(*first)


def sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    model = fully_shard(Weights(8), mesh=mesh)
    with pytest.raises(ValueError, match="whole on each rank"):
        vb.backward(model, ones(2, 8), module=model, **BF16)


def test_sharded_parameters_are_refused():
    ranks.run(sharded, 2)
