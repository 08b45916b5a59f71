"""Windows of some of the ranks, or of none: evaluation, planning, and ranks that train apart."""

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases
from tests.torch.replicated import gradients, mse_of, network, rows, uncut
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

# Plans by memory alone: times are another test's.
pytestmark = pytest.mark.usefixtures("untimed_plans")

TWO, THREE = Cases(2), Cases(3)


@TWO.case
def evaluation(rank):
    net = DistributedDataParallel(network())
    with torch.no_grad():
        together = vb.loss(
            mse_of(net), rows(*[(0, 5), (5, 24)][rank]), module=net, microbatch_size=4
        )
        apart = None
        if rank == 0:
            apart = float(
                vb.loss(
                    mse_of(net.module),
                    rows(0, 5),
                    module=net.module,
                    group=False,
                    microbatch_size=2,
                )
            )
    # The other rank must not be waiting for an evaluation that it takes no part in.
    vb.backward(mse_of(net), rows(*[(0, 5), (5, 24)][rank]), module=net, microbatch_size=4)
    return float(together), apart, gradients(net.module)


def test_evaluation_is_of_all_rows_and_one_rank_may_evaluate_alone():
    loss, due = uncut(network(), mse_of)
    alone, _ = uncut(network(), mse_of, rows(0, 5))
    for rank, (together, apart, gradient) in enumerate(evaluation()):
        assert_close(together, loss)
        assert_all_close(gradient, due)
        if rank == 0:
            assert_close(apart, alone)


@THREE.case
def part_of_the_ranks(rank):
    group = distributed.new_group([0, 2])
    if rank == 1:
        inner = network()
        vb.backward(mse_of(inner), rows(0, 4), module=inner, microbatch_size=3, group=False)
        return gradients(inner)
    net = DistributedDataParallel(network(), process_group=group)
    cut = (0, 5) if rank == 0 else (5, 24)
    vb.backward(mse_of(net), rows(*cut), module=net, microbatch_size=4, group=group)
    return gradients(net.module)


def test_weights_are_summed_over_the_ranks_of_the_module_and_no_others():
    _, due = uncut(network(), mse_of)
    _, alone = uncut(network(), mse_of, rows(0, 4))
    first, second, third = part_of_the_ranks()
    assert_all_close(first, due)
    assert_all_close(second, alone)
    assert_all_close(third, due)


@TWO.case
def plan_on_one_rank(rank):
    net = DistributedDataParallel(network(), bucket_cap_mb=0.0005)
    # A step of PyTorch's own, after which the next forward pass would rebuild buckets.
    mse_of(net)(rows(0, 4)).backward()
    net.zero_grad()
    size = torch.zeros((), dtype=torch.int64)
    if rank == 0:
        size += vb.plan(mse_of(net), rows(0, 24), module=net).microbatch_size
    distributed.broadcast(size, 0)
    batch = rows(*[(0, 5), (5, 24)][rank])
    vb.backward(mse_of(net), batch, module=net, microbatch_size=int(size))
    return int(size), gradients(net.module)


def test_one_rank_may_plan_for_all():
    _, due = uncut(network(), mse_of)
    for size, found in plan_on_one_rank():
        assert 1 <= size <= 24
        assert_all_close(found, due)


@TWO.case
def automatic(rank):
    net = DistributedDataParallel(network())
    cut = [(0, 5), (5, 24)][rank]
    vb.backward(mse_of(net), rows(*cut), module=net, microbatch_size="auto")
    return gradients(net.module)


def test_each_rank_plans_for_itself():
    _, due = uncut(network(), mse_of)
    for found in automatic():
        assert_all_close(found, due)


@TWO.case
def dropped(rank):
    net = DistributedDataParallel(network())
    batch = rows(*[(0, 5), (5, 24)][rank])
    options = {"module": net, "microbatch_size": 4}
    vb.loss(mse_of(net), batch, **options)
    untouched = gradients(net.module)
    loss = vb.loss(mse_of(net), batch, **options)
    loss.backward()
    return untouched, gradients(net.module)


def test_a_dropped_loss_leaves_nothing_to_the_next_window():
    _, due = uncut(network(), mse_of)
    for untouched, found in dropped():
        assert untouched == [None] * len(due)
        assert_all_close(found, due)


@TWO.case
def two_losses(rank):
    net = DistributedDataParallel(network())
    first, second = [(0, 3), (3, 8)][rank], [(8, 20), (20, 24)][rank]
    losses = [
        vb.loss(mse_of(net), rows(*cut), module=net, microbatch_size=4) for cut in (first, second)
    ]
    (losses[0] + 3 * losses[1]).backward()
    return gradients(net.module)


def test_two_losses_in_one_backward_pass_are_added_up_once():
    _, first = uncut(network(), mse_of, rows(0, 8))
    _, second = uncut(network(), mse_of, rows(8, 24))
    for found in two_losses():
        assert_all_close(found, [a + 3 * b for a, b in zip(first, second, strict=True)])
