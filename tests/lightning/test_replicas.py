"""Two processes with DDP: updates are those of all rows, reduced once."""

import logging
import os
import warnings

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from tests.lightning.nets import Net, Run, error, rows, tokens
from tests.torch.ranks import Cases
from torch import distributed
from torch.utils.data import DataLoader, Subset

CASES = Cases(2, limit=60, group_limit=20)
ROWS = 40


def _loader(rank, batch, of=ROWS):
    """Each rank has its half of every 20 rows, the ones with few tokens and with many."""
    order = [
        k for start in range(0, of, 20) for k in range(start + 10 * rank, start + 10 * rank + 10)
    ]
    return DataLoader(Subset(rows(of), order), batch_size=batch)


def _run(rank, batch=10, steps=1, ours=None, net=Net, find_unused=False):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run = Run(
        batch,
        steps,
        ours,
        net,
        _loader(rank, batch),
        strategy=DDPStrategy(find_unused_parameters=find_unused),
        devices=2,
        use_distributed_sampler=False,
    )
    return Result(run)


class Result:
    """What one rank is told of its training."""

    def __init__(self, run):
        self.weights, self.start, self.log = run.weights, run.start, run.log
        self.norms, self.calls = run.watch.norms, run.module.calls
        self.losses = [float(outputs["loss"]) for outputs in run.watch.outputs]
        self.reductions = run.module.reductions


class Counted(Net):
    """Counts the buckets that are reduced."""

    reductions = 0

    def on_train_start(self):
        model = self.trainer.strategy.model
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(self, _counting)


def _counting(module, bucket):
    module.reductions += 1
    work = distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
    return work.then(lambda done: done.value()[0])


class TightOnOne(Counted):
    """Memory runs out on rank 1 alone."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and len(batch[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return output


class WithUnused(Counted):
    """Has parameters that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Linear(3, 3)


OURS = {"weight": tokens}
CUT = {"weight": tokens, "microbatch_size": 3}
theirs = CASES.case(lambda rank: _run(rank, 5, 2, net=Counted), "theirs")
found = {
    "2 x 10": CASES.case(lambda rank: _run(rank, 10, 1, CUT, Counted), "whole"),
    "2 x 2 of 5": CASES.case(lambda rank: _run(rank, 5, 2, OURS, Counted), "collected"),
    "2 x 2 of 5 cut": CASES.case(lambda rank: _run(rank, 5, 2, CUT, Counted), "cut"),
    "2 x 2 of 5 planned": CASES.case(
        lambda rank: _run(rank, 5, 2, OURS | {"microbatch_size": "auto"}, Counted), "planned"
    ),
    "out of memory on one": CASES.case(
        lambda rank: _run(rank, 10, 1, {"weight": tokens, "microbatch_size": 6}, TightOnOne),
        "tight",
    ),
}
unused = CASES.case(lambda rank: _run(rank, 10, 1, CUT, WithUnused, find_unused=True), "unused")


@pytest.fixture(scope="module")
def whole():
    """One process on the rows of both."""
    return Run(20, loader=DataLoader(rows(ROWS), batch_size=20))


@pytest.mark.parametrize("name", found)
def test_updates_are_those_of_the_rows_of_all_ranks(whole, name):
    for rank in found[name]():
        assert error(rank, whole) <= 1e-12
        norms = rank.norms if len(rank.norms) == 4 else rank.norms[1::2]
        assert norms == pytest.approx(whole.watch.norms, rel=1e-11)
        losses = rank.losses if len(rank.losses) == 4 else rank.losses[1::2]
        assert losses == pytest.approx([float(x["loss"]) for x in whole.watch.outputs], rel=1e-12)
        assert rank.reductions == 4


def test_lightning_s_own_is_not(whole):
    for rank in theirs():
        assert error(rank, whole) > 0.1


def test_parameters_that_no_loss_reaches():
    whole = Run(20, loader=DataLoader(rows(ROWS), batch_size=20), net=WithUnused)

    for rank in unused():
        assert error(rank, whole) <= 1e-12


def test_logs_are_those_of_the_rank(whole):
    """As in Lightning: without sync_dist each rank logs its own rows."""
    loss = [row["loss_step"] for _, row in found["2 x 10"]()[0].log if "loss_step" in row]

    assert len(loss) == 4
    few = rows(ROWS)[:10]
    net = Net()
    logits = net(few[0]).flatten(0, 1)
    first = torch.nn.functional.cross_entropy(logits, few[1].flatten())
    assert loss[0] == pytest.approx(float(first.detach()), rel=1e-12)


def test_fabric_with_ddp_uses_loss(whole):
    """No adapter: `fabric.backward(loss(...))`."""
    for weights in fabric():
        assert float((weights - _by_fabric(0, 1)).abs().max()) <= 1e-12


def _by_fabric(rank, world):
    import virtualbatch.torch as engine

    net = Net()
    fabric = lightning.Fabric(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto"
    )
    fabric.launch()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    batches = _loader(rank, 10) if world > 1 else DataLoader(rows(ROWS), batch_size=20)
    for batch in batches:

        def loss_fn(part):
            return torch.nn.functional.cross_entropy(
                model(part[0]).flatten(0, 1), part[1].flatten()
            )

        optimizer.zero_grad()
        fabric.backward(engine.loss(loss_fn, batch, module=model, microbatch_size=3, weight=tokens))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@CASES.case
def fabric(rank):
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    warnings.simplefilter("ignore")
    return _by_fabric(rank, 2)
