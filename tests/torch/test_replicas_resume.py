"""Training that stops after a window, and goes on in another number of processes."""

import os
import signal
from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.tiers import tiered
from tests.torch import ranks
from tests.torch.replicated import (
    VERBS,
    network,
    rows,
    terms_of,
    weight,
)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

UPDATES = 6
CUTS = {1: [(0, 24)], 2: [(0, 7), (7, 24)], 3: [(0, 3), (3, 3), (3, 24)]}


def step(inner, net, optimizer, cut, verb):
    optimizer.zero_grad()
    VERBS[verb](terms_of(net, inner), rows(*cut), module=net, microbatch_size=4, weight=weight)
    torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
    optimizer.step()


def trained(rank, world, updates, verb="backward", source=None, target=None, terminated=None):
    """Weights after so many updates, and how many there were."""
    # Imported by the parent already: see `checkpoints`.
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    inner = network()
    net = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.05)
    if source is not None:
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        checkpoint.load(state, checkpoint_id=source)
        set_state_dict(
            net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    told = torch.zeros(())
    signal.signal(signal.SIGTERM, lambda *_: told.fill_(1))
    done = 0
    while done < updates and not told:
        if rank == 0 and done == terminated:
            os.kill(os.getpid(), signal.SIGTERM)
        step(inner, net, optimizer, CUTS[world][rank], verb)
        done += 1
        # All stop after the same update.
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
    if target is not None:
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer), strict=True))
        checkpoint.save(state, checkpoint_id=target)
    return [p.detach().numpy() for p in inner.parameters()], done


@pytest.fixture(scope="module")
def checkpoints():
    """What children would import otherwise, each for itself."""


@pytest.fixture(scope="module")
def uninterrupted():
    inner = network()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.05)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        sum(terms_of(inner, inner)(rows(0, 24)).values()).backward()
        torch.nn.utils.clip_grad_norm_(inner.parameters(), 1.0)
        optimizer.step()
    return [p.detach().numpy() for p in inner.parameters()]


WORLDS = [(2, 1), (1, 2), (2, 3), (3, 2)]


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("worlds", tiered(WORLDS, [(2, 3)], "further numbers of processes"))
def test_resumed_in_another_number_of_processes(worlds, uninterrupted, tmp_path):
    first, second = worlds
    ranks.run(partial(trained, updates=3, target=tmp_path), first)
    for found, _ in ranks.run(partial(trained, updates=3, source=tmp_path, verb="loss"), second):
        assert_all_close(found, uninterrupted)


@pytest.mark.usefixtures("checkpoints")
def test_one_rank_is_told_to_stop_and_all_do_after_the_same_update(uninterrupted, tmp_path):
    stopped = ranks.run(partial(trained, updates=UPDATES, target=tmp_path, terminated=2), 2)
    assert [done for _, done in stopped] == [3, 3]
    for found, _ in ranks.run(partial(trained, updates=UPDATES - 3, source=tmp_path), 2):
        assert_all_close(found, uninterrupted)
