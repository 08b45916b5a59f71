"""Updates that really run out of memory, in a child of little address space.

Not on TensorFlow: there a graph under such a limit ends the process in TensorFlow's own C++, or
hangs it, so there is nothing to compare; docs/plan.md says so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.keras.backends import BACKEND

# A compiled program takes all of a phase's memory at its start; its metrics are fused away.
RECOVERED = {"torch": ["forward", "backward", "accumulate"], "jax": ["forward", "backward"]}
REFUSED = {"torch": ["one row"], "jax": ["update"]}


def limited(phase, verb):
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("limited.py"), phase, verb],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        # Else the C library keeps what is freed and takes address space for each thread, and what
        # fits is a matter of luck.
        # Large arrays are sorted there: a program that XLA has not optimised takes longer.
        env=os.environ
        | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        },
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


# Each phase by one of the verbs: what runs out is the same program.
@pytest.mark.parametrize(
    ("phase", "verb"),
    list(zip(RECOVERED[BACKEND], ["fit", "train_on_batch", "fit"], strict=False)),
)
def test_an_update_that_runs_out_is_that_of_the_smaller_size(phase, verb):
    assert limited(phase, verb) in (32, 16, 8, 4)


@pytest.mark.parametrize("phase", REFUSED[BACKEND])
def test_one_row_that_does_not_fit_leaves_the_model_as_it_was(phase):
    found = limited(phase, "train_on_batch")
    assert found["error"] == "MemoryError"
    for text in (
        "A micro-batch of one row must fit in memory. Got one row, and ",
        " more were asked for with ",
        "The largest parameters are ",
        "checkpointing",
    ):
        assert text in found["text"]
    assert found["intact"]
