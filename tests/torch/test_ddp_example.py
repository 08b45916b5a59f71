"""The example of several processes: stopped by a signal, and gone on with by other numbers of them.

Its oracle is one process that is never stopped. The command of the page, and real signals to real
processes that a launcher has started, are in the thorough tier.
"""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.tiers import tiered
from tests.torch import ranks

import virtualbatch.torch as vb

EXAMPLE = Path(__file__).parents[2] / "examples" / "torch_ddp.py"
# An epoch has eleven updates, so the second one has begun.
STOP_AFTER, ALL = 13, 22


@pytest.fixture(scope="module")
def train():
    """Its function; imported before any rank is forked."""
    return runpy.run_path(str(EXAMPLE))["train"]


def until_told(rank, world, train, file, stop_after):
    """The rank that is told to stop gets its signal within an update, as from a scheduler."""
    calls = []

    def backward(*args, **more):
        calls.append(None)
        if rank == world - 1 and len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return vb_backward(*args, **more)

    vb_backward, vb.backward = vb.backward, backward
    train(file, epochs=2)
    return len(calls)


def updates_and_weights(file):
    updates, model, _ = torch.load(file)
    return updates, model


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """Updates and weights of one process that runs to the end."""
    file = tmp_path_factory.mktemp("uninterrupted") / "digits.pt"
    ranks.run(until_told, 1, train, file, None)
    return updates_and_weights(file)


@pytest.mark.parametrize(
    "worlds",
    tiered([(2, 1), (1, 2), (2, 3)], [(2, 3)], "the same on other numbers of ranks"),
    ids=str,
)
def test_stopped_and_resumed_on_other_ranks(worlds, train, uninterrupted, tmp_path):
    before, after = worlds
    file = tmp_path / "digits.pt"
    stopped = ranks.run(until_told, before, train, file, STOP_AFTER)
    # All of them, after the update in which one was told.
    assert stopped == before * [STOP_AFTER]
    assert updates_and_weights(file)[0] == STOP_AFTER
    resumed = ranks.run(until_told, after, train, file, None)
    assert resumed == after * [ALL - STOP_AFTER]
    updates, weights = updates_and_weights(file)
    assert updates == uninterrupted[0] == ALL
    torch.testing.assert_close(weights, uninterrupted[1], rtol=1e-12, atol=1e-12)


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launched(folder, *command):
    return subprocess.Popen(
        [*LAUNCHER, *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(launcher):
    """What the ranks printed: their updates, by rank."""
    try:
        output, _ = launcher.communicate(timeout=120)
    finally:
        # It ends its ranks, which nobody else knows.
        launcher.terminate()
    assert launcher.returncode == 0, output
    # The ranks write to one pipe, so a line may begin behind another rank's.
    return dict(re.findall(r"rank (\d): (\d+) updates", output))


@pytest.mark.thorough("a launcher and two processes that import everything take 30 s")
def test_the_command_of_the_page(tmp_path):
    assert ended(launched(tmp_path, EXAMPLE)) == {"0": "44", "1": "44"}
    assert updates_and_weights(tmp_path / "digits.pt")[0] == 44


LONG = """
import os, runpy, sys
from pathlib import Path
from torch import distributed
distributed.init_process_group("gloo")
Path(f"pid{distributed.get_rank()}").write_text(str(os.getpid()))
runpy.run_path(sys.argv[1])["train"](Path("digits.pt"), epochs=100000)
distributed.destroy_process_group()
"""


def listens(file):
    """Whether the process whose number is in a file has installed a handler of SIGTERM."""
    if not (file.exists() and file.read_text()):
        return False
    status = Path(f"/proc/{file.read_text()}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.thorough("a launcher and two processes that import everything take 30 s")
def test_a_signal_to_one_rank_stops_all_after_the_same_update(tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    launcher = launched(tmp_path, "long.py", EXAMPLE)
    deadline = time.monotonic() + 120
    while not listens(tmp_path / "pid1") and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    found = ended(launcher)
    updates = updates_and_weights(tmp_path / "digits.pt")[0]
    assert found == {"0": str(updates), "1": str(updates)}
