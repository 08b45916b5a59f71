"""`virtualbatch bench`: who is compared, who is marked, what is written."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from virtualbatch.bench import parent
from virtualbatch.bench.asked import asked
from virtualbatch.bench.case import MODELS, Case
from virtualbatch.bench.comparison import compared, lasting
from virtualbatch.bench.contender import (
    FLOOR,
    OURS,
    PEER,
    VIRTUALBATCH,
    WHOLE,
    WHOLE_BATCH,
    Absent,
    Contender,
)
from virtualbatch.bench.order import Order
from virtualbatch.bench.page import page_of
from virtualbatch.bench.parent import run, run_bench
from virtualbatch.bench.plots import write_plots
from virtualbatch.bench.result import BenchResult, Comparison, Peak, Row
from virtualbatch.bench.settings import Settings
from virtualbatch.bench.stopwatch import TimedPieces
from virtualbatch.bench.sweeps import SWEEPS
from virtualbatch.bench.table import tables
from virtualbatch.cli import app as cli

ROOT = Path(__file__).parent.parent


def stepping(name, role, by, seconds=0.001):
    """A contender whose update moves two weights by that."""
    weights = np.array([1000.0, -1.0])

    def train(updates):
        weights[:] += np.asarray(by) * updates
        return seconds

    return Contender(name, role, train, lambda: [weights.copy()])


def rows_of(*entries):
    found = compared([[stepping("whole", WHOLE, [1, 2]), *entries]], 3, lasting(0.01))
    return {row.name: row for row in found[0]}


def test_an_update_that_is_not_that_of_the_uncut_batch_is_wrong():
    rows = rows_of(
        stepping("ours", OURS, [1, 2.000001]),
        stepping("half", PEER, [0.5, 1]),
        stepping("nan", PEER, [np.nan, 2]),
        stepping("off by a percent", PEER, [1, 2.02]),
        stepping("floor", FLOOR, [7, 7]),
        Absent("other", "other-package"),
    )
    assert {name: row.verdict for name, row in rows.items()} == {
        "whole": "right",
        "ours": "right",
        "half": "wrong",
        "nan": "wrong",
        "off by a percent": "wrong",
        "floor": "not checked",
        "other": "not installed",
    }
    assert rows["half"].error == pytest.approx(0.5)
    assert rows["other"].package == "other-package"
    assert rows["other"].milliseconds is None


def test_times_are_medians_and_relative_to_ours():
    rows = rows_of(
        stepping("ours", OURS, [1, 2], seconds=0.002),
        stepping("peer", PEER, [1, 2], seconds=0.005),
    )
    assert rows["peer"].milliseconds == pytest.approx((5, 5, 5))
    assert rows["peer"].times_ours == pytest.approx((2.5, 2.5, 2.5))


def test_contenders_are_timed_in_rounds_that_go_forth_and_back():
    order = []

    def entry(name, role):
        def train(updates):
            order.append(name)
            return 1.0

        return Contender(name, role, train, lambda: [np.arange(2.0) + len(order)])

    compared([[entry("a", WHOLE), entry("b", OURS), entry("c", PEER)]], 2, lasting(0.5))
    assert order[-6:] == ["a", "b", "c", "c", "b", "a"]


def test_a_trainer_is_timed_from_its_first_micro_batch_to_its_last_update():
    pieces = TimedPieces(["a", "b"], updates=3)
    assert len(pieces) == 6
    assert list(pieces) == ["a", "b"] * 3
    pieces.updated()
    assert 0 < pieces.seconds < 1


@pytest.mark.parametrize("model", MODELS)
def test_a_case_is_the_same_every_time(model):
    case = Case("torch", model, microbatch_size=2, accumulation_steps=3)
    x, y = case.batch()
    assert len(x) == len(y) == case.rows == 6
    assert x.shape[1:] == case.input_shape
    np.testing.assert_array_equal(x, case.batch()[0])


@pytest.mark.thorough("it measures, in a process for each case")
def test_the_smallest_case_on_the_command_line(tmp_path):
    file = tmp_path / "bench.json"
    outcome = CliRunner().invoke(
        cli.app, ["bench", "--quick", "--engine", "jax", "--model", "tokens", "--json", str(file)]
    )
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(file.read_text())
    (comparison,) = result["comparisons"]
    assert comparison["case"] == {
        "engine": "jax",
        "model": "tokens",
        "microbatch_size": 32,
        "accumulation_steps": 8,
        "scale": 1,
    }
    rows = {row["name"]: row for row in comparison["rows"]}
    # Means of means, over micro-batches that have 70 to 1,000 tokens.
    wrong = {name for name, row in rows.items() if row["verdict"] == "wrong"}
    assert wrong == {"optax.MultiSteps, donated", "optax.microbatching"}
    assert rows["virtualbatch"]["verdict"] == "right"
    assert rows["virtualbatch"]["times_ours"] == [1.0, 1.0, 1.0]
    assert rows["hand-written scan"]["verdict"] == "right"
    assert all(0 < row["milliseconds"][0] <= row["milliseconds"][2] for row in rows.values())
    assert result["versions"]["jax"] is not None
    assert "wrong" in outcome.output


@pytest.mark.thorough("it measures, in a process for each case")
def test_memory_is_that_of_the_rows_at_once():
    # An update's threads free its memory after the result is there: taken at once, what is held
    # before the next update has it too, and the peak above that may be nothing.
    case = Case("jax", "transformer", 16, 8)
    whole = run(Order([case], [WHOLE_BATCH], peak_of=WHOLE_BATCH))
    cut = run(Order([case], [VIRTUALBATCH], peak_of=VIRTUALBATCH))
    # 105 MiB at once for 256 rows, here 128; and an eighth of the rows at once in pieces.
    assert 40 * 2**20 < whole < 70 * 2**20
    assert 4 * 2**20 < cut < whole / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "mxnet"], "--engine must be one of torch, jax, "),
        (["--model", "GPT"], "--model must be one of MLP, CNN, "),
        (["--peers", "some"], "--peers must be one of all, none, list. Got --peers some."),
        (
            ["--peers", "list", "--json", "a.json"],
            "--peers list measures nothing, so there is nothing ",
        ),
        (
            ["--peers", "list", "--page", "a.md"],
            "--peers list measures nothing, so there is nothing ",
        ),
        (["--page", "no/such/folder/a.md"], "--page must name a file in an existing folder. "),
        (["--json", "no/such/folder/a.json"], "--json must name a file in an existing folder. "),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(arguments, message, monkeypatch):
    monkeypatch.setattr(cli, "run_bench", lambda *_: pytest.fail("it was measured"))
    outcome = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith(f"Error: {message}")


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jax" else name)
    settings = Settings()
    assert settings.absent_engines == ["jax", "keras-jax"]
    assert "torch" in settings.chosen_engines
    with pytest.raises(ValueError, match=r"keras-jax needs jax, keras\. Got no jax\. Run: "):
        Settings(engines=["keras-jax"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bench needs a framework\. Got none\. Run: "):
        Settings()


@pytest.mark.thorough("it measures, in a process for each case")
def test_a_case_without_a_result_is_noted_and_the_others_are_measured(monkeypatch):
    settings = Settings(engines=["torch"], models=["MLP", "CNN"], quick=True, peers="none")
    fails = """import sys
if '"MLP"' in sys.argv[1]:
    print('lost [/1]', file=sys.stderr)
    raise SystemExit(3)
from virtualbatch.bench.child import main
main()"""
    result = run_bench(settings, str, child=("-c", fails))
    expected = "The case, torch, MLP, 8 micro-batches of 32, ended without a result. "
    assert result.failures == [f"{expected}Got exit code 3.\nlost [/1]"]
    assert [found.case.model for found in result.comparisons] == ["CNN"]
    assert result.failures[0] in printed(result)
    assert f"## Without a result\n\n{expected}Got exit code 3.\n" in page_of(result, [])


def test_a_case_that_takes_too_long_is_noted(monkeypatch):
    monkeypatch.setattr(parent, "_SECONDS_PER_CHILD", 0.2)
    settings = Settings(engines=["torch"], models=["MLP"])
    result = run_bench(settings, str, child=("-c", "import time; time.sleep(9)"))
    assert "Got none in 0.2 s." in result.failures[0]
    monkeypatch.setattr(cli, "run_bench", lambda *_: result)
    assert CliRunner().invoke(cli.app, ["bench", "--engine", "torch"]).exit_code == 1


def test_ours_being_wrong_is_an_exit_code(monkeypatch):
    wrong = Comparison(Case("torch", "MLP"), [Row("virtualbatch", OURS, "wrong", error=0.5)])
    monkeypatch.setattr(cli, "run_bench", lambda *_: result_of([wrong]))
    assert CliRunner().invoke(cli.app, ["bench", "--engine", "torch"]).exit_code == 1


def test_a_script_measures_a_case_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os
from command import apart, parser_of, save
from virtualbatch.bench.children import tell
arguments = parser_of("What it does.", engines=("torch", "jax"), rounds=3).parse_args()
if arguments.one:
    print("a line of the framework's own")
    tell([arguments.one, arguments.rounds, os.environ["OF_THE_CASE"]])
else:
    save(arguments.json, [apart(name, "MLP", OF_THE_CASE="1") for name in arguments.engines])
""")
    file = tmp_path / "found.json"
    options = ["--engines", "jax", "--rounds", "5", "--json", str(file)]
    subprocess.run(
        [sys.executable, str(script), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])},
        check=True,
        timeout=60,
    )
    assert json.loads(file.read_text()) == [[["jax", "MLP"], 5, "1"]]


def test_every_script_that_a_page_names_is_there():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile"]
    named = {name for page in pages for name in re.findall(r"benchmarks/\w+\.py", page.read_text())}
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).is_file()]


def result_of(comparisons, sweeps=None, peaks=None):
    versions = {"torch": "2.13.0", "accelerate": None}
    return BenchResult("2 CPU cores", versions, ["jax"], comparisons, sweeps or {}, peaks or {})


def timed(name, role, milliseconds, times):
    return Row(name, role, "right", None, 1e-6, (milliseconds,) * 3, (times,) * 3)


def printed(result):
    console = Console(width=140, file=io.StringIO())
    console.print(tables(result))
    return console.file.getvalue()


def test_the_table_says_what_was_asked_and_missed_and_what_is_not_there():
    text = printed(
        result_of(
            [
                Comparison(
                    Case("torch", "MLP"),
                    [
                        timed("virtualbatch", OURS, 2.0, 1.0),
                        timed("Accelerate", PEER, 2.2, 1.1),
                        timed("Lightning", PEER, 4.0, 2.0),
                        Row("Hugging Face Trainer", PEER, "not installed", package="transformers"),
                    ],
                )
            ]
        )
    )
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "1.25 MISSED" in lines["Accelerate"]
    assert "1.60" in lines["Lightning"]
    assert "MISSED" not in lines["Lightning"]
    assert "Hugging Face Trainer (not installed: pip install transformers)" in text
    assert "jax: not installed, not measured" in text
    assert "accelerate not installed" in text


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (("torch", "MLP", "Accelerate", PEER), 1.25),
        (("torch", "CNN", "Accelerate", PEER), 1.0),
        (("torch", "tokens", "Accelerate", PEER), None),
        (("jax", "MLP", "hand-written scan", PEER), None),
        (("jax", "transformer", "a floor", FLOOR), 1 / 1.03),
    ],
)
def test_what_is_asked(case, least):
    assert asked(*case) == least


def test_plots_and_tables_of_sweeps(tmp_path):
    def swept(name):
        return [
            Comparison(case, [timed("virtualbatch", OURS, 2.0, 1.0), timed("f", FLOOR, 1.9, 0.95)])
            for case in SWEEPS[name].cases("torch", "MLP")
        ]

    case = Case("torch", "transformer")
    result = result_of(
        [],
        {name: swept(name) for name in SWEEPS},
        {
            "accumulation_steps": [
                Peak(case, "virtualbatch", 2**21),
                Peak(case, "Accelerate", None),
            ],
            "microbatch_size": [],
            "scale": [],
        },
    )
    files = write_plots(tmp_path, result)
    assert {file.name for file in files} == {
        "bench-time-accumulation-steps.png",
        "bench-memory-accumulation-steps.png",
        "bench-time-microbatch-size.png",
        "bench-time-scale.png",
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    text = printed(result)
    assert "ms of an update, by accumulation_steps" in text
    assert "not installed" in text
    page = page_of(result, files)
    assert all(page.count(f"]({file.name})") == 1 for file in files)
    assert "| torch: floor | 0.95 | 0.95 | 0.95 | 0.95 |" in page
    assert "| torch: our time per row, last = 1 | 64.00 | 32.00 | 16.00 |" in page
    assert "| torch: virtualbatch | 2.0 |" in page
    assert "| torch: Accelerate | not installed |" in page


def test_the_page_says_what_was_missed_and_what_is_wrong():
    case = Case("jax", "MLP")
    rows = [
        timed("virtualbatch", OURS, 2.0, 1.0),
        timed("optax.microbatching", PEER, 1.8, 0.9),
        Row("optax.MultiSteps", PEER, "wrong", None, 0.4, (5.0,) * 3, (2.5,) * 3),
        Row("other", PEER, "not installed", package="other"),
    ]
    page = page_of(result_of([Comparison(case, rows)]), [])
    assert "on 2 CPU cores; torch 2.13.0." in page
    assert "| virtualbatch | 2.00 ms |" in page
    assert "| optax.microbatching | **0.90** of 1.00 |" in page
    assert "| optax.MultiSteps | 2.50, *wrong* by 4e-01 |" in page
    assert "| other | not installed |" in page
