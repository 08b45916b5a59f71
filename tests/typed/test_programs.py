"""The typed programs run; `make lint` checks their types, and that mistakes are refused."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = sorted(Path(__file__).parent.glob("*_program.py"))


@pytest.mark.thorough("each program loads a framework, and plans with it")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_program_runs(program: Path) -> None:
    found = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_program_makes_mistakes(program: Path) -> None:
    _, mistakes = program.read_text().split("\ndef mistakes(")
    lines = [line for line in mistakes.splitlines() if line.startswith("    vb")]
    assert len(lines) > 8
    for line in lines:
        assert "# type: ignore[" in line, line
        assert "# pyright: ignore[" in line, line
    assert 'microbatch_size="auot"' in mistakes
