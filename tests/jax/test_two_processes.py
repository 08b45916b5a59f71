"""Two processes of JAX, of two devices each: exact, and what is left when one of them is lost."""

import signal

import pytest
from tests.jax.two_processes import HEARTBEAT, SHUTDOWN
from tests.processes import free_ports, together

pytestmark = pytest.mark.thorough("starts two processes, each of which loads JAX")

DIED = "This most likely indicates that another task died"


def ended(check, limit=120):
    (port,) = free_ports(1)
    return together(
        "tests.jax.two_processes",
        lambda number: [check, str(number), str(port)],
        lambda number: {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PLATFORMS": "cpu",
            # JAX says at this level why it ends a process.
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
        limit=limit,
    )


def test_rows_of_two_processes_are_one_batch():
    for process in ended("exact"):
        assert process.status == 0, process.output
        for rows in ("12 12", "5 19", "0 24"):
            assert f"ok {rows}\n" in process.output


def test_a_process_that_exits_ends_the_other_after_the_heartbeat():
    first, second = ended("exits")
    assert second.status == 3, second.output
    assert first.status == -signal.SIGABRT, first.output
    assert DIED in first.output
    assert first.seconds - second.seconds < HEARTBEAT + 5


def test_a_process_that_raises_waits_for_the_other():
    # Python's exit waits for all processes, and the other one waits for a reduction.
    first, second = ended("raises")
    for process in (first, second):
        assert process.status == -signal.SIGABRT, process.output
        assert DIED in process.output
    assert "ValueError: a bug in one process" in second.output
    assert abs(first.seconds - second.seconds) < SHUTDOWN


def test_the_other_hangs_as_long_as_a_process_lives():
    first, second = ended("lives_on")
    assert second.status == 3, second.output
    assert first.status == -signal.SIGABRT, first.output
    assert first.seconds > second.seconds
