"""What becomes of updates that really run out of memory, phase by phase, in processes of their own.

Each process trains with all the address space that it wants, limits itself (RLIMIT_AS), and trains
again with micro-batches that do not fit. Keras on TensorFlow also does that under a limit of
TensorFlow's own allocator ("keras-tensorflow-allocator"). The update equals, bit by bit, one that
had the smaller size from the start ("recovered"), or is refused by a MemoryError that leaves
everything as it was ("refused"), or another error comes out ("error"), or the framework's own C++
ends the process ("ended") or never returns ("hung").

Usage: python benchmarks/recovery.py [--times 3] [--only keras-tensorflow] [--json FILE]
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from command import parser_of, save

TESTS = Path(__file__).resolve().parents[1] / "tests"
ENGINES = ("torch", "jax", "tensorflow")
PHASES = ("forward", "backward", "accumulate", "update")
SIZES = (32, 16, 8, 4)
# TensorFlow waits ten seconds for memory, each time that there is none.
SECONDS = 150
# Else the C library keeps what is freed and takes address space for each thread, and what fits is a
# matter of luck.
SETTLED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
ALLOCATOR = {"TF_CPU_ALLOCATOR_USE_BFC": "true", "TF_CPU_BFC_MEM_LIMIT_IN_MB": "128"}


def run(script: Path, *arguments: str, more: dict[str, str] | None = None) -> tuple[str, Any]:
    """What became of a process, and what it printed."""
    try:
        child = subprocess.run(
            [sys.executable, script, *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env=os.environ | SETTLED | (more or {}),
        )
    except subprocess.TimeoutExpired:
        return "hung", None
    if child.returncode < 0 or not child.stdout:
        return ("ended" if child.returncode < 0 else "error"), None
    return "", json.loads(child.stdout)


def verdict(ended: str, found: Any) -> str:
    """In a word, what became of one update."""
    if ended:
        return ended
    if isinstance(found, dict):
        return "refused" if found["error"] == "MemoryError" and found["intact"] else "error"
    return "recovered" if found in SIZES else "error"


def of_an_engine(engine: str) -> dict[str, str]:
    ended, found = run(TESTS / engine / "limited.py")
    phases = ("weight", "forward", "backward")
    return {phase: verdict(ended, found and found[phase]) for phase in phases}


def of_keras(backend: str, limited_by: str) -> dict[str, str]:
    script = TESTS / "keras" / "limited.py"
    more = {"KERAS_BACKEND": backend} | (ALLOCATOR if limited_by else {})
    return {
        f"{phase}, {verb}": verdict(*run(script, phase, verb, more=more))
        for phase in PHASES
        for verb in ("fit", "train_on_batch")
    }


def main() -> None:
    names = [*ENGINES, *(f"keras-{engine}" for engine in ENGINES), "keras-tensorflow-allocator"]
    arguments = parser_of(__doc__, only=names, times=3).parse_args()
    results: dict[str, dict[str, Counter[str]]] = {}
    for name in arguments.only:
        counted = results.setdefault(name, {})
        for _ in range(arguments.times):
            framework, _, limited_by = name.removeprefix("keras-").partition("-")
            on_keras = name.startswith("keras-")
            found = of_keras(framework, limited_by) if on_keras else of_an_engine(name)
            for case, word in found.items():
                counted.setdefault(case, Counter())[word] += 1
        print(f"\n{name}")
        for case, words in counted.items():
            print(
                f"  {case:28}" + ", ".join(f"{n} {word}" for word, n in words.items()), flush=True
            )
    save(arguments.json, results)


if __name__ == "__main__":
    main()
