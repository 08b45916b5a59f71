"""Updates that really run out of memory, in a child of little of it.

Little address space, or on TensorFlow a limit to its own allocator: without room for its threads
its C++ ends the process, so there would be nothing to compare; docs/guides/size.md says so.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.keras.backends import BACKEND

# A compiled program takes all of a phase's memory at its start; its metrics are fused away.
RECOVERED = {
    "tensorflow": ["forward", "backward", "accumulate"],
    "torch": ["forward", "backward", "accumulate"],
    "jax": ["forward", "backward"],
}
REFUSED = {"tensorflow": ["update"], "torch": ["one row"], "jax": ["update"]}
LIMITS = {
    # Else the C library keeps what is freed and takes address space for each thread, and what fits
    # is a matter of luck.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    # Large arrays are sorted there: a program that XLA has not optimised takes longer.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    # What the compiler itself loads must be there before the limit.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
if BACKEND == "tensorflow":
    # This needs 2 MiB for each row, and waits ten seconds for memory before it says that it is out.
    LIMITS |= {"TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "128"}


def limited(phase, verb):
    child = subprocess.run(
        [sys.executable, Path(__file__).with_name("limited.py"), phase, verb],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | LIMITS,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


# Each phase by one of the verbs: what runs out is the same program.
@pytest.mark.parametrize(
    ("phase", "verb"),
    [
        ("forward", "fit"),
        *(
            pytest.param(phase, verb, marks=pytest.mark.thorough("another process without memory"))
            for phase, verb in zip(RECOVERED[BACKEND][1:], ["train_on_batch", "fit"], strict=False)
        ),
    ],
)
def test_an_update_that_runs_out_is_that_of_the_smaller_size(phase, verb):
    assert limited(phase, verb) in (32, 16, 8, 4)


@pytest.mark.thorough("another process without memory")
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
    # Not what the machine has, but what may be taken of it.
    assert re.search(r"with [\d.]+ MiB left", found["text"])
