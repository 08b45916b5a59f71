"""`virtualbatch plan` and `check TARGET`: what they print for each engine, and refuse."""

import json
import re
from pathlib import Path

import pytest
from tests.tiers import tiered
from typer.testing import CliRunner

from virtualbatch.cli import app as cli
from virtualbatch.cli.target import ENGINES

pytestmark = [
    pytest.mark.usefixtures("quick_plans"),
    # NumPy's word about variables of Keras, which Keras itself reads through NumPy.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
]

PROGRAMS = Path(__file__).with_name("programs.py")
LINES = {
    "keras_program": "vb.accumulate(model, microbatch_size={})",
    "torch_program": "vb.backward(loss_fn, batch, module=module, microbatch_size={})",
    "tensorflow_program": "vb.value_and_gradients(loss_fn, batch, variables, microbatch_size={})",
    "jax_program": "vb.value_and_grad(fun, microbatch_size={})(*args)",
}


def plan(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])


def refused(*arguments):
    outcome = plan(*arguments)
    assert outcome.exit_code == 2, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


@pytest.mark.parametrize("program", LINES)
def test_a_plan_of_each_engine(program, tmp_path):
    file = tmp_path / "plan.json"
    outcome = plan(f"{PROGRAMS}:{program}", "--batch-size", 512, "--json", file)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(file.read_text())
    size = found["microbatch_size"]
    assert 1 <= size <= 512
    assert found["accumulation_steps"] == -(-512 // size)
    assert outcome.stdout.startswith(f"microbatch_size={size} (accumulation_steps=")
    assert re.search(rf"^ +{size} .* <- chosen$", outcome.stdout, re.MULTILINE)
    assert LINES[program].format(size) in outcome.stdout.splitlines()[-1]


def test_a_limit_cuts(tmp_path):
    file = tmp_path / "plan.json"
    target = f"{PROGRAMS}:jax_program"
    plan(target, "--batch-size", 4096, "--memory-limit", "2MiB", "--json", file)
    found = json.loads(file.read_text())
    assert found["memory_limit"] == 2 * 2**20
    chosen = next(r for r in found["rows"] if r["microbatch_size"] == found["microbatch_size"])
    assert chosen["peak_bytes"] <= 2 * 2**20
    assert found["microbatch_size"] < 4096


def test_a_plan_to_look_at(tmp_path):
    file = tmp_path / "plan.html"
    outcome = plan(f"{PROGRAMS}:jax_program", "--batch-size", 64, "--html", file)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.endswith(f"\nReport: {file}\n")
    assert '<p class="kind">Plan</p>' in file.read_text(encoding="utf-8")


def test_a_module_is_found_from_here(monkeypatch):
    monkeypatch.chdir(PROGRAMS.parent)
    assert plan("programs:jax_program", "--batch-size", 8).exit_code == 0


REFUSED = {
    "no_function": ("programs.py", "TARGET must be file.py:function or module:function. Got "),
    "no_file": ("absent.py:f", "that can be imported. Got FileNotFoundError: [Errno 2] "),
    "no_module": ("no.such:f", "that can be imported. Got ModuleNotFoundError: No module named "),
    "no_name": (f"{PROGRAMS}:absent", "TARGET must name a function. Got no function 'absent' in"),
    "no_callable": (f"{PROGRAMS}:not_a_function", "Got no function 'not_a_function' in"),
    "raises": (
        f"{PROGRAMS}:that_raises",
        "RuntimeError: no data here at programs.py:79, from ",
    ),
    "exits": (f"{PROGRAMS}:that_exits", "Got SystemExit: no data here at programs.py:83, from "),
    "nothing": (f"{PROGRAMS}:of_nothing", "{batch, loss_fn, module}. Got NoneType from "),
    "other_names": (f"{PROGRAMS}:of_other_names", "plan: {args, fun} or {batch, model} or "),
    "another_size": (f"{PROGRAMS}:of_another_size", "Got 16 rows and --batch-size 8. Make the"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_targets_that_are_none(case):
    target, text = REFUSED[case]
    assert text in refused(target, "--batch-size", 8)


def test_a_file_that_does_not_run_is_refused(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def f(:\n")
    assert "Got SyntaxError: invalid syntax" in refused(f"{file}:f", "--batch-size", 8)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ("12 bananas", "Got memory_limit='12 bananas'. Pass for example '2GiB', '500MB' or '80%'."),
        ("10B", "Got a limit of 10 B, and one row needs "),
    ],
)
def test_limits_that_are_none(limit, text):
    target = f"{PROGRAMS}:jax_program"
    assert text in refused(target, "--batch-size", 8, "--memory-limit", limit)


@pytest.mark.parametrize(
    "program", tiered(LINES, ["jax_program"], "the limits of engines are their own tests")
)
def test_a_limit_that_holds_no_row_says_what_one_needs(program):
    text = refused(f"{PROGRAMS}:{program}", "--batch-size", 8, "--memory-limit", "10B")
    assert re.search(r"Got a limit of 10 B, and one row needs \d+\.\d [KM]iB\. Raise", text)


@pytest.mark.parametrize("rows", [1, 0, -3])
def test_a_batch_that_cannot_be_cut_is_refused(rows):
    text = refused(f"{PROGRAMS}:that_raises", "--batch-size", rows)
    assert text.startswith("Error: --batch-size must be 2 or more, because one row cannot be cut.")
    assert f"Got --batch-size {rows}." in text


def test_a_file_that_cannot_be_written_is_refused_first():
    target = f"{PROGRAMS}:that_raises"
    text = refused(target, "--batch-size", 8, "--json", "/absent/plan.json")
    assert "--json must name a file in an existing folder" in text


def test_no_two_engines_are_told_by_the_same_names():
    for engine in ENGINES:
        assert not any(other.arguments <= engine.arguments for other in ENGINES if other != engine)


def check(program, *arguments, size=4):
    target = f"{PROGRAMS}:{program}"
    given = [target, "--batch-size", 16, "--microbatch-size", size, *arguments]
    return CliRunner().invoke(cli.app, ["check", *map(str, given)])


@pytest.mark.parametrize("program", LINES)
def test_a_check_of_each_engine(program, tmp_path):
    file = tmp_path / "check.json"
    page = tmp_path / "check.html"
    outcome = check(program, "--json", file, "--html", page)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.startswith("exact: largest error")
    found = json.loads(file.read_text())
    assert found["exact"] is True
    assert found["max_error"] <= found["tolerance"]
    assert len(found["parameters"]) in (2, 4)
    html = page.read_text(encoding="utf-8")
    assert "Exact: accumulating" in html
    assert f"All {len(found['parameters'])} parameters" in html


def test_a_check_that_is_inexact_exits_with_1(tmp_path):
    file = tmp_path / "check.json"
    page = tmp_path / "check.html"
    outcome = check("sum_program", "--json", file, "--html", page)
    assert outcome.exit_code == 1
    assert "<b>sum_loss</b> at <code>programs.py:" in page.read_text(encoding="utf-8")
    assert outcome.stdout.startswith("NOT exact")
    assert "sum_loss at programs.py:" in outcome.stdout
    assert json.loads(file.read_text())["findings"][0]["kind"] == "sum_loss"


def test_a_check_that_cannot_run_exits_with_2():
    outcome = check("failing_program")
    assert outcome.exit_code == 2
    assert "KeyError: 'no such column'" in outcome.stderr
    outcome = check("jax_program", size=16)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("Error: certify needs a batch that is cut into two")
