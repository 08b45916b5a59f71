"""Two processes under Accelerate: each update is that of the rows of both."""

import os

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from tests.accelerate import scripts
from tests.accelerate.scripts import Script, forget
from tests.masked_tokens import (
    BATCH,
    DECAY,
    EPOCHS,
    RATE,
    ROWS,
    assert_whole,
    assert_wrong,
    data,
    labels,
    loss_of,
)
from tests.torch.ranks import Cases
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

TWO = Cases(2, limit=60)
# With padding, which Accelerate does by default, some rows count twice.
SPLIT = DataLoaderConfiguration(split_batches=True, even_batches=False)
DEALT = DataLoaderConfiguration(even_batches=False)
# Both ranks have as many batches, as the usual way needs.
EVEN_ROWS = 40


def case(fn):
    """A case in which Accelerate finds what `accelerate launch` sets."""

    def launched(rank):
        names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
        for group, value in zip(names, (rank, 2), strict=True):
            os.environ.update(dict.fromkeys(group, str(value)))
        os.environ["OMP_NUM_THREADS"] = "1"
        forget()
        return fn()

    return TWO.case(launched, fn.__name__)


@case
def usual():
    return scripts.usual(4, 5, rows=EVEN_ROWS, dataloader_config=SPLIT)


@case
def split():
    """The schedule steps once an update, because a batch is not larger on two processes."""
    return scripts.windows(BATCH, 1, distributed.group.WORLD, dataloader_config=SPLIT)


@case
def dealt():
    """Twelve micro-batches on one rank, eleven on the other."""
    return scripts.windows(
        2, 5, distributed.group.WORLD, dataloader_config=DEALT, step_scheduler_with_optimizer=False
    )


@case
def whole_on_both():
    return scripts.ours(3, rows=EVEN_ROWS, dataloader_config=SPLIT)


@case
def in_accumulate():
    return scripts.ours_in_accumulate(3, rows=EVEN_ROWS, dataloader_config=SPLIT)


@case
def one_runs_out_of_memory():
    script = Script(rows=EVEN_ROWS, dataloader_config=SPLIT)
    sizes = []

    def hungry(batch):
        sizes.append(len(batch[0]))
        if distributed.get_rank() == 1 and len(sizes) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(script.model)(batch)

    for _ in range(EPOCHS):
        for batch in script.loader:
            options = {"module": script.model, "weight": labels, "microbatch_size": 5}
            script.update(vb.loss(hungry, batch, **options))
    return sizes, script.trained()


@case
def default_schedule():
    """Accelerate's rule where batches grow with the processes: a step for each process."""
    script = Script(batch_size=10, rows=EVEN_ROWS)
    for batch in script.loader:
        script.update(script.loss(batch, microbatch_size=3))
    return script.schedule.get_last_lr(), isinstance(script.model, DistributedDataParallel)


@case
def evaluated():
    script = Script(batch_size=4, dataloader_config=DEALT)
    script.model.eval()
    with torch.no_grad():
        (window,) = vb.windows(script.loader, 6, group=distributed.group.WORLD)
        return float(script.loss(window)), float(loss_of(script.model)(data()[:ROWS]))


@pytest.mark.parametrize(
    ("results", "rows"),
    [(split, ROWS), (dealt, ROWS), (whole_on_both, EVEN_ROWS), (in_accumulate, EVEN_ROWS)],
    ids=["split, the last window on one rank", "dealt, uneven", "split evenly", "in accumulate"],
)
def test_every_rank_trains_on_the_rows_of_both(results, rows):
    first, second = results()
    for found in (first, second):
        assert_whole(found, rows)
        assert_wrong(usual()[0], EVEN_ROWS)
    assert first.norms == second.norms
    assert torch.equal(first.weights, second.weights)


def test_a_rank_that_runs_out_of_memory_stops_nobody():
    (sizes, first), (smaller, second) = one_runs_out_of_memory()
    assert sizes == [5, 5] * 4
    assert smaller == [5, 5] + [2] * 20
    assert_whole(first, EVEN_ROWS)
    assert torch.equal(first.weights, second.weights)


def test_a_schedule_steps_as_accelerate_has_it():
    for rate, is_ddp in default_schedule():
        assert rate == pytest.approx([RATE * DECAY ** (2 * 2)])
        assert is_ddp


def test_evaluation_is_the_mean_of_the_rows_of_both():
    for found, due in evaluated():
        assert found == pytest.approx(due, rel=1e-12)
