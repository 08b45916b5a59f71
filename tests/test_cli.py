"""The command line: its surface, its errors, its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import virtualbatch
from virtualbatch.cli import app as cli
from virtualbatch.cli import doctor
from virtualbatch.demo.parent import ChildFailure


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_commands_and_options_are_these() -> None:
    # Adding one is a decision about the public interface: change this set on purpose.
    import typer

    surface = {
        (name, option)
        for name, command in typer.main.get_command(cli.app).commands.items()
        for parameter in command.params
        for option in parameter.opts
    }
    assert surface == {
        ("demo", "--epochs"),
        ("demo", "--batch-size"),
        ("demo", "--microbatch-size"),
        ("demo", "--json"),
        ("demo", "--html"),
        ("plan", "target"),
        ("plan", "--batch-size"),
        ("plan", "--memory-limit"),
        ("plan", "--json"),
        ("plan", "--html"),
        *(
            (name, option)
            for name in ("check", "certify")
            for option in ("target", "--batch-size", "--microbatch-size", "--json", "--html")
        ),
        ("bench", "--engine"),
        ("bench", "--model"),
        ("bench", "--peers"),
        ("bench", "--quick"),
        ("bench", "--page"),
        ("bench", "--json"),
        ("doctor", "--json"),
    }


def test_version(runner: CliRunner) -> None:
    outcome = runner.invoke(cli.app, ["--version"])
    assert outcome.exit_code == 0
    assert outcome.stdout == f"{virtualbatch.__version__}\n"


def test_the_module_is_the_command() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "virtualbatch", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert outcome.stdout == f"{virtualbatch.__version__}\n"


@pytest.mark.parametrize("tool", ["typer", "rich"])
def test_without_its_tools_the_command_says_what_to_install(tool: str) -> None:
    program = f"import sys; sys.modules[{tool!r}] = None; import virtualbatch.__main__"
    child = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 2
    assert child.stderr == (
        f"The command virtualbatch needs rich and typer. Got no {tool}. "
        'Run: pip install "virtualbatch[cli]"\n'
    )


def test_no_command_shows_the_help(runner: CliRunner) -> None:
    outcome = runner.invoke(cli.app, [])
    assert "Commands:" in outcome.output
    assert "doctor" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--epochs", "0"],
            "Error: --epochs must be a positive integer. Got --epochs 0.\n",
        ),
        (
            ["--microbatch-size", "-1"],
            "Error: --microbatch-size must be a positive integer. Got --microbatch-size -1.\n",
        ),
        (
            ["--batch-size", "16", "--microbatch-size", "32"],
            "Error: --microbatch-size must not exceed --batch-size. Got 32 and 16. "
            "Pass --microbatch-size 16 or less.\n",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    runner: CliRunner, arguments: list[str], message: str
) -> None:
    outcome = runner.invoke(cli.app, ["demo", *arguments])
    assert outcome.exit_code == 2
    assert outcome.stderr == message


@pytest.mark.parametrize(
    ("command", "option"), [("demo", "--json"), ("demo", "--html"), ("doctor", "--json")]
)
def test_a_file_that_cannot_be_written_is_refused_first(
    runner: CliRunner, command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*arguments: object) -> None:
        raise AssertionError("the command ran")

    monkeypatch.setattr(cli, "run_demo", must_not_run)
    monkeypatch.setattr(cli, "diagnose", must_not_run)

    outcome = runner.invoke(cli.app, [command, option, str(tmp_path / "missing" / "file")])
    assert outcome.exit_code == 2
    assert f"{option} must name a file in an existing folder. Got" in outcome.stderr

    outcome = runner.invoke(cli.app, [command, option, str(tmp_path)])
    assert outcome.exit_code == 2
    assert f"{option} must name a file. Got the folder" in outcome.stderr


def test_a_failed_run_is_an_error_with_exit_code_2(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ChildFailure("The run ended without a result. Got exit code 9.")

    monkeypatch.setattr(cli, "run_demo", fail)
    outcome = runner.invoke(cli.app, ["demo"])
    assert outcome.exit_code == 2
    assert outcome.stderr == "Error: The run ended without a result. Got exit code 9.\n"


def test_doctor_prints_and_writes_json(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tests/test_doctor.py asks the frameworks.
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {})
    file = tmp_path / "doctor.json"
    outcome = runner.invoke(cli.app, ["doctor", "--json", str(file)])
    assert outcome.exit_code == 0
    assert outcome.stdout.startswith(f"virtualbatch {virtualbatch.__version__}, Python ")
    assert json.loads(file.read_text())["virtualbatch"] == virtualbatch.__version__
