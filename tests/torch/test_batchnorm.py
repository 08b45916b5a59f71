"""BatchNorm: each micro-batch by itself, one momentum update with the moments of all rows."""

import copy
import threading

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.problems import taken
from torch import nn

import virtualbatch.torch as vb


def images(rows=11, dtype=torch.float64):
    return (
        torch.randn(rows, 3, 5, 4, dtype=dtype) * torch.tensor([1.0, 4.0, 0.1])[:, None, None] + 9
    )


def assert_same_statistics(found, expected, rtol=1e-12):
    assert found.momentum == expected.momentum
    assert_close(found.running_mean, expected.running_mean, rtol)
    assert_close(found.running_var, expected.running_var, rtol)
    assert found.num_batches_tracked.item() == expected.num_batches_tracked.item()


@pytest.mark.parametrize("momentum", [0.1, 0.37, 1.0, 0.0, None])
@pytest.mark.parametrize("size", [3, 4, 11])
def test_statistics_are_those_of_the_whole_batch(size, momentum):
    ours = nn.BatchNorm2d(3, momentum=momentum).double()
    whole = copy.deepcopy(ours)
    for _ in range(3):
        x = images()
        vb.backward(lambda x: ours(x).square().mean(), x, module=ours, microbatch_size=size)
        whole(x)
        assert_same_statistics(ours, whole)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (9, 3)),
        (nn.BatchNorm1d(3), (9, 3, 4)),
        (nn.BatchNorm3d(3), (9, 3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (9, 3, 2)),
        (nn.BatchNorm2d(3, affine=True), (9, 3, 2, 2)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_every_kind_of_layer(layer, shape):
    ours, whole = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    x = torch.randn(*shape, dtype=torch.float64) + 2
    vb.backward(lambda x: ours(x).square().mean(), x, module=ours, microbatch_size=4)
    whole(x)
    assert_same_statistics(ours, whole)


def test_gradients_are_those_of_micro_batches_normalised_by_themselves():
    # Peer case R7: this is what cannot be exact, and the contract that is kept instead.
    ours = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
    ours.append(nn.Linear(48, 1)).double()
    oracle = copy.deepcopy(ours)
    x = images(10)
    loss = vb.backward(lambda x: ours(x).square().mean(), x, module=ours, microbatch_size=4)
    due = sum(oracle(part).square().mean() * len(part) / 10 for part in x.tensor_split([4, 7]))
    due.backward()
    assert_close(loss, due.detach())
    assert_all_close(taken(ours), taken(oracle))


def test_nested_layers_follow_what_they_saw():
    # The first layer sees the inputs of the whole batch; the second sees normalised micro-batches.
    ours = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))).double()
    first, oracle = copy.deepcopy(ours[0]), copy.deepcopy(ours)
    x = images(9)
    vb.backward(lambda x: ours(x).square().mean(), x, module=ours, microbatch_size=3)
    first(x)
    assert_same_statistics(ours[0], first)
    seen = torch.cat([oracle[1][0](oracle[0](part)) for part in x.split(3)])
    oracle[1][1](seen)
    assert_same_statistics(ours[1][1], oracle[1][1])


def test_a_layer_called_twice_updates_twice_in_call_order():
    ours = nn.BatchNorm2d(3).double()
    whole = copy.deepcopy(ours)
    x = images()

    def loss_fn(x):
        return ours(x).mean() + ours(3 * x + 1).square().mean()

    vb.backward(loss_fn, x, module=ours, microbatch_size=4)
    whole(x), whole(3 * x + 1)
    assert_same_statistics(ours, whole)
    assert ours.num_batches_tracked == 2


def test_a_call_that_only_some_micro_batches_make():
    ours = nn.BatchNorm1d(2).double()
    whole = copy.deepcopy(ours)
    x = torch.randn(8, 2, dtype=torch.float64)
    x[:4, 0], x[4:, 0] = 1.0, -1.0

    def loss_fn(x):
        return ours(x).mean() if x[0, 0] > 0 else ours.weight.mean()

    vb.backward(loss_fn, x, module=ours, microbatch_size=4)
    whole(x[:4])
    assert_same_statistics(ours, whole)


def test_layers_in_evaluation_mode_stay():
    ours = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3)).double()
    vb.backward(lambda x: ours(x).square().mean(), images(), module=ours, microbatch_size=4)
    assert ours[0].num_batches_tracked == 0
    assert (ours[0].running_mean == 0).all()
    assert ours[1].num_batches_tracked == 1


def test_layers_without_running_statistics():
    ours = nn.BatchNorm2d(3, track_running_stats=False).double()
    vb.backward(lambda x: ours(x).square().mean(), images(), module=ours, microbatch_size=4)
    assert ours.running_mean is None
    assert ours.weight.grad.isfinite().all()


def test_rows_without_weight_are_seen_too():
    ours = nn.BatchNorm1d(2).double()
    whole = copy.deepcopy(ours)
    batch = {"x": torch.randn(6, 2).double(), "mask": torch.tensor([1.0, 1, 0, 0, 1, 0])}

    def loss_fn(batch):
        return (ours(batch["x"]).sum(1) * batch["mask"]).sum() / batch["mask"].sum()

    vb.backward(
        loss_fn, batch, module=ours, microbatch_size=2, weight=lambda batch: batch["mask"].sum()
    )
    whole(batch["x"])
    assert_same_statistics(ours, whole)
    assert ours.weight.grad.isfinite().all()


def test_checkpointing_does_not_count_twice():
    ours = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh()).double()
    whole = copy.deepcopy(ours)
    x = images()

    def loss_fn(x):
        return torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False).square().mean()

    vb.backward(loss_fn, x, module=ours, microbatch_size=4)
    whole(x)
    assert_same_statistics(ours[1], whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_means_do_not_cancel(dtype):
    # E[x^2] - E[x]^2 would lose every digit of a spread of 1e-3 around 1e2.
    ours = nn.BatchNorm1d(1)
    x = (torch.randn(64, 1, dtype=torch.float64) * 0.5 + 100).to(dtype)
    vb.backward(lambda x: ours(x.float()).mean(), x, module=ours, microbatch_size=8)
    whole = nn.BatchNorm1d(1)
    whole(x.float())
    assert_same_statistics(ours, whole, 1e-4)


def test_an_uneven_cut_leaves_no_lone_row():
    # 9 rows by 4 cut greedily would be 4, 4, 1, and BatchNorm refuses the 1.
    ours = nn.BatchNorm1d(2).double()
    x = torch.randn(9, 2).double()
    vb.backward(lambda x: ours(x).square().mean(), x, module=ours, microbatch_size=4)
    assert ours.num_batches_tracked == 1


def test_nothing_is_left_behind():
    ours = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None))
    keys = [sorted(vars(module)) for module in ours.modules()]
    buffers = list(ours.buffers())
    vb.backward(lambda x: ours(x).mean(), torch.randn(6, 2), module=ours, microbatch_size=2)
    assert [sorted(vars(module)) for module in ours.modules()] == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    assert ours[1].momentum is None
    assert all(a is b for a, b in zip(buffers, ours.buffers(), strict=True))


def test_hooks_of_the_user_stay_and_fire():
    ours = nn.BatchNorm1d(2)
    seen = []
    ours.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    vb.backward(lambda x: ours(x).mean(), torch.randn(5, 2), module=ours, microbatch_size=3)
    assert seen == [3, 2]
    assert len(ours._forward_hooks) == 1


def test_a_layer_that_cannot_be_heard_is_refused():
    ours = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError, match=r"must be called as modules.*Write layer\(x\)"):
        vb.backward(
            lambda x: ours.forward(x).mean(), torch.randn(6, 2), module=ours, microbatch_size=3
        )
    assert (ours.num_batches_tracked, ours.momentum, ours.weight.grad) == (0, 0.1, None)
    assert (ours.running_mean == 0).all()


def test_a_window_inside_a_window_of_the_same_layer_is_refused():
    ours = nn.BatchNorm1d(2)

    def nested(x):
        vb.backward(lambda x: ours(x).mean(), x, module=ours, microbatch_size=2)
        return ours(x).mean()

    with pytest.raises(RuntimeError, match=r"one window at a time.* Got BatchNorm1d inside a win"):
        vb.backward(nested, torch.randn(6, 2), module=ours, microbatch_size=3)
    assert (ours.num_batches_tracked, ours.momentum, ours.weight.grad) == (0, 0.1, None)
    assert not ours._forward_hooks


def test_a_window_of_another_layer_may_lie_inside_a_window():
    outer, inner = nn.BatchNorm1d(2).double(), nn.BatchNorm1d(2).double()
    whole, x = copy.deepcopy(outer), torch.randn(8, 2, dtype=torch.float64)

    def nested(x):
        vb.backward(lambda x: inner(x).mean(), x, module=inner, microbatch_size=2)
        return outer(x).mean()

    vb.backward(nested, x, module=outer, microbatch_size=4)
    whole(x)
    assert_same_statistics(outer, whole)
    assert inner.num_batches_tracked == 2


def test_a_second_thread_cannot_keep_the_momentum_of_a_window():
    # The second window would begin inside the first one and end after it.
    ours, x = nn.BatchNorm1d(2), torch.randn(6, 2)
    inside, ended, refusals = threading.Event(), threading.Event(), []

    def second():
        inside.wait(60)
        try:
            vb.backward(waiting, x, module=ours, microbatch_size=3)
        except RuntimeError as error:
            refusals.append(str(error))
        inside.clear()

    def waiting(x):
        ended.wait(60)
        return ours(x).mean()

    def first(x):
        inside.set()
        thread.join(0.2)
        return ours(x).mean()

    thread = threading.Thread(target=second)
    thread.start()
    vb.backward(first, x, module=ours, microbatch_size=3)
    ended.set()
    thread.join(60)
    assert (ours.momentum, ours.num_batches_tracked, len(ours._forward_hooks)) == (0.1, 1, 0)
    assert len(refusals) == 1
    assert "one window at a time" in refusals[0]
