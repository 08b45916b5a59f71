"""A script with Accelerate on one process trains as PyTorch alone does on whole batches."""

import pytest
import torch
from tests.accelerate import scripts
from tests.masked_tokens import (
    BATCH,
    DECAY,
    RATE,
    WRONG,
    Net,
    assert_whole,
    assert_wrong,
    flat,
    whole_batches,
)

WAYS = {
    "whole batches, cut evenly": lambda: scripts.ours(3),
    "cut into single rows": lambda: scripts.ours(1),
    "a size that divides nothing": lambda: scripts.ours(7),
    "a size above the batch": lambda: scripts.ours(64),
    "inside accumulate": lambda: scripts.ours_in_accumulate(3),
    "windows of five, the last ones short": lambda: scripts.windows(4, 5),
    "backward_fn": lambda: scripts.by_backward_fn(3),
    "compiled": lambda: scripts.ours(10, dynamo_backend="eager"),
}


@pytest.fixture(scope="module")
def usual(one_thread):
    return scripts.usual(4, 5)


@pytest.mark.parametrize("way", WAYS)
def test_weights_norms_logged_losses_and_schedule_are_those_of_whole_batches(way, usual):
    found = WAYS[way]()
    assert len(found.norms) == 6
    assert found.rate == pytest.approx(RATE * DECAY**6, rel=1e-12)
    assert_whole(found)
    assert_wrong(usual)


def test_bfloat16_rounds_no_more_than_the_whole_batch_does():
    def distance(found):
        due = whole_batches().weights
        return float((found.weights - due).norm() / (due - flat(Net().double())).norm())

    options = {"mixed_precision": "bf16", "dtype": torch.float32}
    whole = distance(scripts.usual(BATCH, 1, **options))
    assert 1e-4 < distance(scripts.ours(3, **options)) <= 1.2 * whole
    assert distance(scripts.usual(4, 5, **options)) > WRONG > whole


def test_what_a_script_logs_is_the_loss_of_the_window(usual):
    """Inside `accumulate` it is that of the last micro-batch."""
    due = whole_batches().losses
    torch.testing.assert_close(scripts.windows(4, 5).losses, due, rtol=1e-12, atol=0)
    assert max(abs(a - b) for a, b in zip(usual.losses, due, strict=True)) > 0.05
