"""Two workers of MultiWorkerMirroredStrategy, each a process of its own, started anew."""

import json

import pytest
from tests.oracle import EXACT
from tests.processes import free_ports, together
from tests.tensorflow.replicated import CUTS

pytestmark = pytest.mark.thorough("two processes import TensorFlow, and wait for each other")


def ran(check):
    """What both workers did."""
    ports = [str(port) for port in free_ports(2)]
    return together(
        "tests.tensorflow.two_workers",
        lambda worker: [str(worker), *ports, check],
        lambda worker: {"CUDA_VISIBLE_DEVICES": "-1"},
        limit=200,
    )


def result(ended):
    assert ended.status == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("## ")]
    return json.loads(line.removeprefix("## "))


def test_three_terms_of_all_workers_in_two_reductions():
    first, second = map(result, ran("three_terms_of_all_workers"))
    for found, reductions in (first, second):
        assert found.keys() == CUTS.keys()
        for _, *errors in found.values():
            assert max(errors) <= EXACT
        assert reductions == {"top": 2}
    # The loss is the same on both, to the last digit.
    assert [x[0] for x in first[0].values()] == [x[0] for x in second[0].values()]


@pytest.mark.parametrize("check", ["raising_in_a_step", "raising_while_traced"])
def test_a_worker_that_raises_ends_the_other(check):
    first, second = map(result, ran(check))
    assert "a fault of worker 1" in second[1]
    assert first[0] == "UnavailableError"
    assert "Collective ops is aborted" in first[1]


def test_a_worker_that_dies_ends_the_other():
    first, second = ran("dying")
    assert second.status == 9
    assert result(first)[0] == "UnavailableError"
