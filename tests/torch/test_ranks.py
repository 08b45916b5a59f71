"""The harness of several processes tells apart what ranks do, and ends in time."""

import os
import signal
import time

import pytest
import torch
from tests.torch import ranks
from torch import distributed


def add_up(rank, world, base):
    value = torch.tensor(float(base + rank))
    distributed.all_reduce(value)
    return value, world


def test_each_rank_returns_its_value():
    found = ranks.run(add_up, 3, 10)
    assert [(float(value), world) for value, world in found] == [(33.0, 3)] * 3


def test_what_went_wrong_is_told_with_traces():
    def each(rank, world):
        if rank == 0:
            raise KeyError("absent")
        return rank

    with pytest.raises(AssertionError, match=r"(?s)rank 0 raised\. KeyError: 'absent'.*in each"):
        ranks.run(each, 2)


def test_raised_died_and_returned_are_told_apart():
    def each(rank, world):
        if rank == 0:
            raise SystemExit(3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return "well"

    found = ranks.outcomes(each, 3)
    assert [did.ended for did in found] == ["raised", "died", "returned"]
    assert found[0].error == "SystemExit: 3"
    assert found[2].value == "well"


def test_a_rank_that_waits_for_another_has_hung():
    def each(rank, world):
        if rank == 0:
            distributed.barrier()

    began = time.monotonic()
    found = ranks.outcomes(each, 2, limit=0.5, group_limit=30)
    assert time.monotonic() - began < 5
    assert [did.ended for did in found] == ["hung", "returned"]
    assert "in barrier" in found[0].trace
