"""What is refused with fully sharded modules, and what a failed window leaves behind."""

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.ranks import Cases
from tests.torch.replicated import rows, uncut
from tests.torch.sharded import full_gradients, mse_of, net, sharded, steps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import virtualbatch.torch as vb
from virtualbatch.window.window import Window

TWO, FOUR = Cases(2, limit=60), Cases(4, limit=60)
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def error_of(call, *given, **options):
    """What a call raises, in words."""
    try:
        call(*given, **options)
    except Exception as error:  # Judged by its text.
        notes = " ".join(getattr(error, "__notes__", []))
        return f"{type(error).__name__}: {error} {notes}"
    return "nothing was raised"


def half_window(rank):
    module = sharded(net().float(), mp_policy=HALF)
    return error_of(steps, module, 0, 12, reduce="window")


def half_loss(rank):
    module = fully_shard(nn.Linear(6, 6).bfloat16())
    batch = rows(0, 12)["x"].bfloat16()
    return error_of(
        vb.backward, lambda x: module(x).mean(), batch, module=module, microbatch_size=4
    )


def overlapped(rank):
    return error_of(steps, sharded(), 0, 12, reduce="overlapped")


def statistics(rank):
    return error_of(steps, sharded(), 0, 12, stats=True)


def planned(rank):
    return error_of(steps, sharded(), 0, 12, microbatch_size="auto")


def apart(rank):
    return error_of(steps, sharded(), 0, 12, group=False)


def talking(rank):
    module = fully_shard(nn.Sequential(nn.Linear(6, 6), nn.SyncBatchNorm(6)))
    return error_of(vb.backward, module, rows(0, 12)["x"], module=module, microbatch_size=4)


def unsharded(rank):
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    fully_shard(module[0])
    return error_of(vb.backward, module, rows(0, 12)["x"], module=module, microbatch_size=4)


def penalty_of_shards(rank):
    module = sharded()

    def loss_fn(batch):
        return mse_of(module)(batch) + sum(p.square().sum() for p in module.blocks.parameters())

    return error_of(vb.backward, loss_fn, rows(0, 12), module=module, microbatch_size=4)


def other_factors(rank):
    module = sharded()
    module.tokens.set_gradient_divide_factor(1.0)
    return error_of(steps, module, 0, 12)


REFUSED = {
    half_window: 'reduce="window" adds unsharded gradients in the reduce dtype, which must be '
    "float32. Got bfloat16. Make the policy with reduce_dtype=torch.float32, or use "
    'reduce="microbatch".',
    half_loss: "With fully_shard a loss must be float32 or wider. Got bfloat16. Return",
    overlapped: "reduce of a fully sharded module must be 'microbatch' or 'window'. Got",
    statistics: "Got stats=True with fully_shard, which shows only sums over all ranks.",
    planned: 'plan and microbatch_size="auto" measure one device. Got FSDPNet',
    apart: "group=False is for ranks that train apart. Got it with FSDPNet",
    talking: "Got SyncBatchNorm. Use BatchNorm",
    unsharded: "Got a parameter of shape (6, 6) that fully_shard does not hold, or ignores.",
    penalty_of_shards: "Got a loss that uses the shards of a parameter of shape (6,). Move",
    other_factors: "Got 1.0, 2 from set_gradient_divide_factor. Set one for all of them.",
}
FOUND = {fn: TWO.case(fn) for fn in REFUSED}


@pytest.mark.parametrize("fn", REFUSED, ids=lambda fn: fn.__name__)
def test_refused(fn):
    for error in FOUND[fn]():
        assert error.startswith("ValueError: ")
        assert REFUSED[fn] in error


@FOUR.case
def half_replicas(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = sharded(net().float(), mesh=mesh, mp_policy=HALF)
    return error_of(steps, module, 0, 12)


def test_replicas_of_shards_do_not_sum_in_half_precision():
    for error in half_replicas():
        assert "Replicas of shards add gradients of micro-batches in the reduce dtype" in error


def goes_on(rank, module, due_error, **options):
    """Fails in the middle of a window, and then trains."""
    batch = rows(12 * rank, 12 * rank + 12)
    options = {"module": module, **options}
    calls = []

    def failing(given):
        loss = due_error["loss_fn"](module, given, calls)
        return (loss, due_error["aux"](rank)) if "aux" in due_error else loss

    steps(module, 12 * rank, 12 * rank + 12)
    kept = [p.grad for p in module.parameters()]
    values = full_gradients(module)
    more = {"has_aux": True} if "aux" in due_error else {}
    weight = due_error.get("weight")
    if weight is not None:
        more["weight"] = lambda given: weight(rank, given)
    error = error_of(vb.backward, failing, batch, microbatch_size=4, **options, **more)
    is_kept = all(p.grad is before for p, before in zip(module.parameters(), kept, strict=True))
    assert is_kept
    assert_all_close(full_gradients(module), values, rtol=0)
    vb.backward(mse_of(module), batch, microbatch_size=4, **options)
    return error, full_gradients(module)


def plain_loss(module, given, calls):
    return mse_of(module)(given)


def out_of_memory(module, given, calls):
    """Memory runs out between the forward and the backward pass of the second micro-batch."""
    loss = mse_of(module)(given)
    calls.append(1)
    if len(calls) == 2:
        raise MemoryError("no memory left")
    return loss


def weight_of_rank_1(rank, given):
    if rank == 1:
        raise KeyError("tokens")
    return given["a"].sum() * 0 + len(given["x"])


def aux_of_rank_1(rank):
    return "text" if rank == 1 else torch.zeros(())


def without_a_forward_pass(module, given, calls):
    raise KeyError("labels")


OUT_OF_MEMORY = {
    reduce: TWO.case(
        lambda rank, r=reduce: goes_on(rank, sharded(), {"loss_fn": out_of_memory}, reduce=r),
        f"out of memory, {reduce}",
    )
    for reduce in ("microbatch", "window")
}


@pytest.mark.parametrize("reduce", OUT_OF_MEMORY)
def test_all_ranks_run_out_of_memory_and_go_on(reduce):
    _, due = uncut(net(), mse_of)
    for error, gradients in OUT_OF_MEMORY[reduce]():
        assert error.startswith("MemoryError: no memory left")
        assert "Pass a smaller microbatch_size on all ranks" in error
        # The rest of the failed window would show here.
        assert_all_close(gradients, [2 * x for x in due])


# Before the first micro-batch and after the last: rank 1 raises, and rank 0 is told.
TOLD = {
    "weight": ({"loss_fn": plain_loss, "weight": weight_of_rank_1}, "KeyError: 'tokens'"),
    "aux": ({"loss_fn": plain_loss, "aux": aux_of_rank_1}, "TypeError: A leaf of aux must"),
}
TOLD_FOUND = {
    name: TWO.case(lambda rank, g=given: goes_on(rank, sharded(), g), f"told, {name}")
    for name, (given, _) in TOLD.items()
}


@pytest.mark.parametrize("name", TOLD)
def test_an_error_of_one_rank_is_raised_on_all(name):
    _, due = uncut(net(), mse_of)
    (told, first), (own, second) = TOLD_FOUND[name]()
    assert told.startswith("RuntimeError: Another rank failed in this window.")
    assert own.startswith(TOLD[name][1])
    for gradients in (first, second):
        assert_all_close(gradients, [2 * x for x in due])


@TWO.case
def before_any_forward_pass(rank):
    module = sharded()
    error = error_of(
        vb.backward,
        lambda given: without_a_forward_pass(module, given, []),
        rows(12 * rank, 12 * rank + 12),
        module=module,
        microbatch_size=4,
    )
    steps(module, 12 * rank, 12 * rank + 12)
    return error, full_gradients(module)


def test_a_loss_that_fails_before_any_forward_pass_raises_its_own_error():
    _, due = uncut(net(), mse_of)
    for error, gradients in before_any_forward_pass():
        assert error.startswith("KeyError: 'labels'")
        assert_all_close(gradients, due)


@TWO.case
def empty_window(rank):
    module = sharded()
    size = {} if rank == 0 else {"microbatch_size": 4}
    batch = Window([]) if rank == 0 else rows(0, 24)
    return error_of(vb.backward, mse_of(module), batch, module=module, **size)


def test_a_rank_without_rows_says_what_they_look_like():
    own, told = empty_window()
    assert own.startswith("ValueError: A rank without rows runs in step with the others")
    assert "Pass a batch whose tensors have 0 rows, such as x[:0], on this rank." in own
    assert told.startswith("RuntimeError: Another rank failed in this window.")


@TWO.case
def no_rows_anywhere(rank):
    module = sharded()
    return error_of(steps, module, 0, 0)


def test_no_rows_on_any_rank():
    for error in no_rows_anywhere():
        assert error.startswith(
            "ValueError: A window must have a row on at least one rank. Got none on"
        )
