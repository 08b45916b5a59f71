"""Tries what `make dist` built, as somebody would who has nothing else installed.

    python tests/dist.py dist

The wheel is installed in an empty environment: it must import without any framework, say what the
command line needs, and make an update with one engine once that is installed.
"""

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = ROOT / "build" / "dist-environment"
PYTHON = HERE / "bin" / "python"

IMPORTED = """
import importlib.metadata
import sys

import virtualbatch

assert virtualbatch.__version__ == importlib.metadata.version("virtualbatch")
found = {"tensorflow", "keras", "torch", "jax", "typer", "rich"} & set(sys.modules)
assert not found, found
print("imported", virtualbatch.__version__, "from", virtualbatch.__file__)
"""
UPDATED = """
import jax
import jax.numpy as jnp

import virtualbatch.jax as vb

x = jnp.arange(12.0).reshape(6, 2)
loss_fn = lambda w, x: ((x @ w) ** 2).mean()
due = jax.grad(loss_fn)(jnp.ones(2), x)
_, found = vb.value_and_grad(loss_fn, microbatch_size=4)(jnp.ones(2), x)
assert jnp.allclose(found, due), (found, due)
print("updated:", found)
"""


def run(*command, status=0):
    """What a command printed; it must end with this status."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=HERE)
    if done.returncode != status:
        sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def install(*what):
    constraints = ROOT / "constraints.txt"
    run(PYTHON, "-m", "pip", "install", "--quiet", "--constraint", constraints, *what)


def main(folder):
    (wheel,) = folder.glob("*.whl")
    (source,) = folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert "virtualbatch/py.typed" in names
    assert not [name for name in names if not name.startswith("virtualbatch")], names
    with tarfile.open(source) as archive:
        held = {Path(name).parts[1] for name in archive.getnames() if "/" in name}
    assert {"src", "tests", "docs", "examples", "benchmarks", "LICENSE", "README.md"} <= held, held

    shutil.rmtree(HERE, ignore_errors=True)
    venv.create(HERE, with_pip=True)
    install(wheel)
    print(run(PYTHON, "-c", IMPORTED).strip())
    said = run(HERE / "bin" / "virtualbatch", "doctor", status=2)
    assert 'Run: pip install "virtualbatch[cli]"' in said, said
    install(f"{wheel}[jax]")
    print(run(PYTHON, "-c", UPDATED).strip())
    install(f"{wheel}[cli]")
    assert "jax" in run(HERE / "bin" / "virtualbatch", "doctor")
    shutil.rmtree(HERE)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
