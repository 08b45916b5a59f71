"""Trainers on two processes with DistributedDataParallel, against one with the uncut batch."""

import os
from functools import cache, partial

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tests.torch.ranks import Cases
from tests.transformers.losses import ClassWeighted, RowMeans
from tests.transformers.training import (
    HEADS,
    error,
    loss_error,
    rows_of,
    run,
    trained,
    trainer_of,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from virtualbatch.transformers import accumulate

# All cases share one group of processes; each takes some tenths of a second.
TWO = Cases(2, limit=100, group_limit=20)
# Two updates of 10 rows on each of two processes.
ROWS = 40
OURS = {
    "window": (2, 5, {}),
    "cut": (10, 1, {"microbatch_size": 3}),
    "packed": (10, 1, {"microbatch_tokens": 40}),
}


def as_rank(rank):
    """Lets the trainers of this process find the group that it is in."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    # Asked for, and not used by a group that there is.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    torch.set_default_dtype(torch.float64)
    # What the trainers of the parent found was one process.
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def given_rows(head):
    return rows_of(HEADS[head][1], ROWS)


class Reductions(TrainerCallback):
    """Hears of each bucket that is reduced.

    Attributes:
        trainer: whose; it is set after it is made.
        buckets: numbers of the buckets, as they came.
    """

    trainer = None

    def __init__(self):
        self.buckets = []

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model_wrapped
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(None, self._hook)

    def _hook(self, state, bucket):
        self.buckets.append(bucket.index())
        return allreduce_hook(None, bucket)


def on_two(rank, head, batch, steps, ours=None, prepare=None, cls=Trainer, rows=None, **more):
    """What a training of half the rows of each update leaves, and the buckets that it reduced."""
    as_rank(rank)
    heard = Reductions()
    trainer = trainer_of(
        head,
        batch,
        steps,
        cls=cls,
        rows=given_rows(head) if rows is None else rows,
        given={"callbacks": [heard]},
        **{"ddp_backend": "gloo", "num_train_epochs": 1, **more},
    )
    heard.trainer = trainer
    if ours is not None:
        accumulate(trainer, **ours)
    if prepare is not None:
        prepare(rank, trainer)
    found = trained(trainer)
    return found._replace(trainer=None), heard.buckets


@cache
def uncut(head, **more):
    """The trainer alone, on one process."""
    return run(head, 20, 1, rows=given_rows(head), num_train_epochs=1, **more)


def assert_exact(results, due):
    """Both ranks end where one process with the whole batch ends, and log what it logs."""
    for found, _ in results:
        assert error(found, due) < 1e-11
        assert loss_error(found, due) < 1e-12


OWN = {
    head: TWO.case(partial(on_two, head=head, batch=10, steps=1), f"{head} own")
    for head in ("masked", "sequence", "gpt2")
}
EXACT = {
    (head, name): TWO.case(
        partial(on_two, head=head, batch=batch, steps=steps, ours=ours), f"{head} {name}"
    )
    for head in OWN
    for name, (batch, steps, ours) in OURS.items()
    # Its own way is right, so one of ours is enough.
    if (head, name) not in (("gpt2", "window"), ("gpt2", "packed"))
}


@pytest.mark.parametrize(("head", "off_by"), [("masked", 1.9), ("sequence", 0.48)])
def test_a_head_that_ignores_the_count_is_wrong_on_two_processes_without_accumulation(head, off_by):
    for found, buckets in OWN[head]():
        assert error(found, uncut(head)) == pytest.approx(off_by, abs=0.05)
        assert loss_error(found, uncut(head)) > 1
        assert buckets == [0, 0]


def test_a_head_that_takes_the_count_is_right_on_two_processes():
    assert_exact(OWN["gpt2"](), uncut("gpt2"))


@pytest.mark.parametrize(("head", "name"), EXACT)
def test_an_update_of_two_processes_is_that_of_one(head, name):
    results = EXACT[head, name]()
    assert_exact(results, uncut(head))
    # Two updates, however many micro-batches they have.
    assert [buckets for _, buckets in results] == [[0, 0], [0, 0]]


OFF = {"average_tokens_across_devices": False}
WITHOUT_AVERAGE = {
    head: TWO.case(
        partial(on_two, head=head, batch=10, steps=1, ours={"microbatch_size": 3}, **OFF),
        f"{head} off",
    )
    for head in ("masked",)
}
OWN_WITHOUT_AVERAGE = TWO.case(partial(on_two, head="gpt2", batch=10, steps=1, **OFF), "own off")


@pytest.mark.parametrize("head", WITHOUT_AVERAGE)
def test_tokens_are_averaged_over_devices_whatever_the_trainer_is_told(head):
    assert_exact(WITHOUT_AVERAGE[head](), uncut(head))


def test_the_trainer_alone_weighs_ranks_alike_where_tokens_are_not_averaged():
    for found, _ in OWN_WITHOUT_AVERAGE():
        assert error(found, uncut("gpt2")) > 0.01


class InOrder(Trainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class RowMeansInOrder(InOrder, RowMeans):
    """Both."""


def full_rows(count, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 9), generator=draw).tolist()
    return [{"input_ids": x, "attention_mask": [1] * 9, "labels": x} for x in ids]


# On the first rank rows and their labels are in the same proportion, so both weights fit. On the
# second they are not, from the first update on, or not before the second.
LATE = {
    "at once": full_rows(10, 0) + rows_of("tokens", 10, 1) + full_rows(20, 2),
    "later": full_rows(30, 0) + rows_of("tokens", 10, 1),
}
DIFFERENT = {
    when: TWO.case(
        partial(
            on_two,
            head="masked",
            batch=10,
            steps=1,
            ours={"microbatch_size": 3},
            cls=RowMeansInOrder,
            rows=rows,
        ),
        f"different {when}",
    )
    for when, rows in LATE.items()
}


@pytest.mark.parametrize("when", LATE)
def test_one_rank_can_tell_the_weight_and_the_other_cannot(when):
    rows = LATE[when]
    due = run("masked", 20, 1, cls=RowMeansInOrder, rows=rows, num_train_epochs=1)
    assert_exact(DIFFERENT[when](), due)


def runs_out_on_the_second(rank, trainer):
    """From its third micro-batch on, more than 2 rows are too many for one of the ranks."""
    calls = []

    def before(model, args, kwargs):
        if rank == 1 and model.training:
            calls.append(1)
            if len(calls) > 2 and len(kwargs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(before, with_kwargs=True)


OUT_OF_MEMORY = {
    name: TWO.case(
        partial(
            on_two,
            head="masked",
            batch=batch,
            steps=steps,
            ours=ours,
            prepare=runs_out_on_the_second,
        ),
        f"out of memory {name}",
    )
    for name, (batch, steps, ours) in (
        ("window", (5, 2, {})),
        ("cut", OURS["cut"]),
    )
}


@pytest.mark.parametrize("name", OUT_OF_MEMORY)
def test_memory_runs_out_on_one_rank(name):
    results = OUT_OF_MEMORY[name]()
    assert_exact(results, uncut("masked"))
    assert [buckets for _, buckets in results] == [[0, 0], [0, 0]]


class WeightedOnOne(ClassWeighted):
    on_ranks = (1,)


class BreaksOnOne(InOrder):
    """Its loss raises on one rank, in the second update."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 1:
            raise KeyError("no such thing")
        return super().compute_loss(model, inputs, *args, **kwargs)


def refused(rank, cls):
    """What a rank raises."""
    with pytest.raises((ValueError, RuntimeError, KeyError)) as raised:
        on_two(rank, "sequence", 10, 1, {"microbatch_size": 3}, cls=cls)
    return type(raised.value).__name__, str(raised.value)


REFUSED = {
    cls: TWO.case(partial(refused, cls=cls), cls.__name__)
    for cls in (ClassWeighted, WeightedOnOne, BreaksOnOne)
}


@pytest.mark.parametrize("cls", [ClassWeighted, WeightedOnOne])
def test_all_ranks_refuse_a_loss_that_no_weight_puts_together(cls):
    for kind, text in REFUSED[cls]():
        assert kind == "ValueError"
        assert text.startswith("A loss must be one mean or sum over rows")
        assert f"Got the loss of {cls.__name__} on BertForSequenceClassification" in text


def test_a_rank_hears_of_an_error_on_another():
    (first, text), (second, _) = REFUSED[BreaksOnOne]()
    assert (first, second) == ("RuntimeError", "KeyError")
    assert text.startswith("Another rank failed in this window.")


COMPILED = Cases(2, limit=100).case(
    partial(
        on_two,
        head="masked",
        batch=10,
        steps=1,
        ours={"microbatch_size": 5},
        ddp_find_unused_parameters=False,
        torch_compile=True,
        torch_compile_backend="eager",
    ),
    "compiled",
)


@pytest.mark.thorough("compiling a model takes seconds on each rank")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_on_two_processes():
    assert_exact(COMPILED(), uncut("masked"))
