"""What is left out of the quick tier says why."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.run import Ran, table, without_durations
from tests.tiers import refuse_a_tier_without_a_reason, tiered

ROOT = Path(__file__).parent.parent


def marked(*args, **kwargs):
    marks = [pytest.mark.thorough(*args, **kwargs).mark]
    return SimpleNamespace(nodeid="tests/test_a.py::test_b", iter_markers=lambda name: marks)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), (("",), {}), ((" ",), {}), (("one\ntwo",), {}), ((3,), {}), ((), {"reason": "a"})],
)
def test_a_thorough_test_without_a_reason_is_refused(args, kwargs):
    with pytest.raises(pytest.UsageError, match=r"must say in one line why(.|\n)*test_a\.py"):
        refuse_a_tier_without_a_reason([marked(*args, **kwargs)])


def test_a_reason_is_enough():
    refuse_a_tier_without_a_reason([marked("further points of the same kind")])


def test_pytest_refuses_it_at_collection(tmp_path):
    # The mark as it is without a call; pytest gives it no arguments.
    file = tmp_path / "test_slow.py"
    file.write_text("import pytest\n@pytest.mark.thorough\ndef test_slow():\n    pass\n")
    # Our settings and our conftest, on a test that is not ours.
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    child = subprocess.run(
        [*command, "-p", "tests.conftest", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == pytest.ExitCode.USAGE_ERROR, child.stdout
    assert "must say in one line why" in child.stderr


def test_some_values_of_a_parameter_are_tried_in_both_tiers():
    first, second, third = tiered("abc", "b", "more letters")
    assert second == "b"
    for param in (first, third):
        (mark,) = param.marks
        assert (mark.name, mark.args) == ("thorough", ("more letters",))
    with pytest.raises(ValueError, match=r"Got \['d'\], not among"):
        tiered("abc", "d", "a slip of the pen")


OUTPUT = """\
tests/test_a.py ..                        [100%]

============================= slowest durations ==============================
1.00s call     tests/test_a.py::test_b
0.10s setup    tests/test_a.py::test_b

(2 durations < 0.005s hidden.)
========================= short test summary info ============================
SKIPPED [1] tests/test_a.py:3: no GPU
======================== 1 passed, 1 skipped in 1.10s ========================
"""


def test_a_part_is_shown_without_the_times_of_its_tests():
    shown = without_durations(OUTPUT)
    assert "call" not in shown
    assert "hidden" not in shown
    assert shown.splitlines()[:1] == OUTPUT.splitlines()[:1]
    assert shown.splitlines()[-3:] == OUTPUT.splitlines()[-3:]


def test_the_table_sums_and_shows_what_failed():
    ran = {"jax": Ran(1, 7, 10.0, 6.0, ""), "torch": Ran(0, 3, 5.5, 4.0, "")}
    _, jax, torch, everything = table(ran, 6.5).splitlines()
    assert jax.split()[:4] == ["jax", "7", "10.0", "6.0"]
    assert "FAILED (exit status 1)" in jax
    assert "FAILED" not in torch
    assert everything.split() == ["all", "10", "15.5", "6.5"]
