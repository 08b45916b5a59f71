"""Every test belongs to a backend that can run it, and none is lost between them."""

import subprocess
import sys
from pathlib import Path

import keras
import pytest
from tests.keras.backends import BACKEND, LACKING, available, ignored

HERE = Path(__file__).parent


def test_folders_are_those_of_backends():
    folders = {path.parent.name for path in HERE.glob("*/test_*.py")}
    assert folders <= {"tensorflow", "torch", "jax"}
    for backend in folders:
        assert backend not in ignored(backend)
        assert folders - {backend} <= set(ignored(backend))


@pytest.mark.thorough("collects all tests once more in a process of its own")
def test_every_file_of_this_backend_is_collected():
    root = HERE.parents[1]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", str(HERE)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stdout
    collected = {line.split("::")[0] for line in child.stdout.splitlines() if "::" in line}
    files = {*HERE.glob("test_*.py"), *(HERE / BACKEND).glob("test_*.py")}
    if not available("values in call"):
        files.remove(HERE / "test_inside_a_window.py")
    assert collected == {path.relative_to(root).as_posix() for path in files}


def test_what_is_lacking_names_real_backends_with_a_reason():
    for lacking in LACKING.values():
        assert set(lacking) <= {"tensorflow", "torch", "jax"}
        assert all(lacking.values())
    assert available()


def test_the_backend_under_test_is_that_of_keras():
    assert keras.backend.backend() == BACKEND
