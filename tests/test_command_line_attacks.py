"""Command lines that cannot be run, and files that cannot be written.

Exit code 1 says that something is not exact. So whatever could not be run or written is one line
and exit code 2, and what stood in a file before still stands there.
"""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tests import reports
from tests.tiers import tiered
from typer.testing import CliRunner

from virtualbatch.cli import app as cli
from virtualbatch.cli import doctor

pytestmark = [
    pytest.mark.usefixtures("quick_plans"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
]

HOSTILE = Path(__file__).with_name("hostile_programs.py")
PROGRAMS = Path(__file__).with_name("programs.py")


def invoked(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def check(target, *more):
    return invoked("check", target, "--batch-size", 8, "--microbatch-size", 4, *more)


def refused(outcome, code=2):
    """The one line of a command that could not be run."""
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.exit_code == code
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
    assert "Traceback" not in outcome.output
    return outcome.stderr


# What the line says, beside the class and the text of what was raised.
IN_CHECK = {
    "loss_raises": "RuntimeError: no such column at hostile_programs.py:",
    "loss_raises_value_error": "Got ValueError: bad value at hostile_programs.py:",
    "loss_raises_type_error": "Got TypeError: bad type at hostile_programs.py:",
    "loss_raises_key_error": "Got KeyError: 'labels' at hostile_programs.py:",
    "loss_raises_nothing_said": "Got ZeroDivisionError at hostile_programs.py:",
    "loss_raises_memory_error": "Got MemoryError: my pool is empty at hostile_programs.py:",
    "loss_raises_os_error": "Got FileNotFoundError: [Errno 2] No such file: 'data.csv' at",
    "loss_raises_import_error": "Got ModuleNotFoundError: No module named 'absent' at",
    "loss_raises_unicode": "ValueError: ",
    "loss_raises_without_text": "Got NoText: (its text cannot be read: RuntimeError) at",
    "loss_raises_no_exception": "NoException: not even one",
    "loss_recurses": "Got RecursionError: maximum recursion depth exceeded at",
    "loss_stops": "Got StopIteration at",
    "loss_asserts": "Got AssertionError at",
    "loss_exits_well": "Got SystemExit: 0 at hostile_programs.py:",
    "loss_exits": "Got SystemExit: no data at",
    "loss_raises_in_a_library": "hostile_programs.py:",
    "loss_raises_deep": "Got KeyError: 'labels' at hostile_programs.py:",
    "loss_gives_none": "",
    "loss_gives_rows": "",
    "loss_is_none": "",
    "module_is_none": "",
    "module_is_text": "",
    "batch_is_none": "",
    "batch_is_empty": "",
    "batch_is_text": "",
    "rows_differ": "",
    "other_rows": "Got 3 rows and --batch-size 8.",
    "one_more": "Got 'learning_rate' among them. Leave it out.",
    "its_own_size": "without microbatch_size. Got 'microbatch_size' among them. Leave it out.",
    "no_text_as_name": "Got 3 among them. Leave it out.",
    "args_of_nothing": "Got args=() and batch_argnum=1. Return for example",
    "args_of_one": "Got args=(1.0,) and batch_argnum=1.",
    "args_of_none": "Got args=None and batch_argnum=1.",
    "args_of_text": "Got args=() and batch_argnum='batch'.",
    "args_far_away": "Got args=(1.0, 2.0) and batch_argnum=(0, 7).",
    "program_raises": "Got ValueError: no data at hostile_programs.py:",
    "program_exits_well": "Got SystemExit: 0 at hostile_programs.py:",
    "program_runs_out": "Got MemoryError at hostile_programs.py:",
    "program_without_rows": "Got TypeError: program_without_rows() takes 0 positional arguments",
    "program_gives_a_list": "Got list from",
    "program_gives_text": "Got str from",
    "program_later": "Got coroutine from",
    "absent": "Got no function 'absent' in",
    "torch": "Got no function 'torch' in",
}


@pytest.mark.parametrize("program", IN_CHECK)
def test_a_program_that_fails_is_one_line(program):
    assert IN_CHECK[program] in refused(check(f"{HOSTILE}:{program}"))


IN_PLAN = ["loss_raises", "loss_exits_well", "loss_gives_none", "one_more", "args_of_nothing"]


@pytest.mark.parametrize("program", IN_PLAN)
def test_so_is_one_that_is_planned(program):
    outcome = invoked("plan", f"{HOSTILE}:{program}", "--batch-size", 8)
    assert IN_CHECK[program] in refused(outcome)


def test_the_line_says_how_to_see_the_traceback():
    text = refused(check(f"{HOSTILE}:loss_raises"))
    assert text.endswith(
        "Call virtualbatch.torch.certify with it in Python to see the whole traceback.\n"
    )


def test_an_interrupt_is_none_of_these():
    outcome = check(f"{HOSTILE}:loss_is_interrupted")
    assert (outcome.exit_code, outcome.stderr) == (130, "")


TARGETS = {
    "": "TARGET must be file.py:function or module:function. Got ''.",
    ":": "Got ':'.",
    "a.py": "Got 'a.py'.",
    ":f": "Got ':f'.",
    "a.py:": "Got 'a.py:'.",
    "no/such.py:f": "Got FileNotFoundError: [Errno 2]",
    "no.such.module:f": "Got ModuleNotFoundError: No module named 'no'",
    "..:f": "that can be imported. Got ",
    ".py:f": "that can be imported. Got ",
    "tests:f": "Got no function 'f' in 'tests'.",
    f"{Path(__file__).parent}.py:f": "that can be imported. Got ",
    "json:loads": "TARGET must return a program. Got TypeError: the JSON object must be str,",
    "builtins:exit": "Got SystemExit: 8",
    "os:abs": "Got no function 'abs' in 'os'.",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_that_is_none_is_one_line(target):
    assert TARGETS[target] in refused(check(target))


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "a.py:f"),
        ("check", "a.py:f", "--batch-size", "8"),
        ("check", "a.py:f", "--batch-size", "1", "--microbatch-size", "1"),
        ("check", "a.py:f", "--batch-size", "8", "--microbatch-size", "0"),
        ("check", "a.py:f", "--batch-size", "eight", "--microbatch-size", "4"),
        ("check", "a.py:f", "--batch-size", "8", "--microbatch-size", "4", "--json"),
        ("plan", "a.py:f", "--batch-size", "8.5"),
        ("plan", "--batch-size", "8", "--no-such-option"),
        ("no-such-command",),
        ("bench", "--quick", "yes"),
    ],
)
def test_a_command_line_that_does_not_parse_is_exit_code_2(arguments):
    outcome = invoked(*arguments)
    assert outcome.exit_code == 2
    assert isinstance(outcome.exception, SystemExit)
    assert "Error: " in outcome.stderr
    assert "Traceback" not in outcome.output


OLD = '{"an": "old report"}'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an old report, a folder, and links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text(OLD)
    (tmp_path / "old.json").chmod(0o600)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to("old.json")
    (tmp_path / "around.json").symlink_to("around.json")
    (tmp_path / "train.py").write_text("def program(rows):\n    raise AssertionError('it ran')\n")
    return tmp_path


UNWRITABLE = {
    "a folder": (["--json", "folder"], "--json must name a file. Got the folder folder."),
    "nothing": (["--json", ""], "--json must name a file. Got the folder ."),
    "no folder": (["--html", "no/a.html"], "existing folder. Got --html no/a.html. Run: mkdir -p"),
    "under a file": (["--json", "old.json/a"], "--json must name a file in an existing folder."),
    "a long name": (["--json", 300 * "a"], "(File name too long). Any file there is unchanged."),
    "links that meet": (["--json", "around.json"], "(Too many levels of symbolic links)."),
    "one file": (["--json", "x", "--html", "x"], "--json and --html must name two files. Got x"),
    "one file, said otherwise": (["--json", "x", "--html", "./folder/../x"], "two files. Got x"),
    "one file, by a link": (["--json", "old.json", "--html", "link.json"], "must name two files."),
    "the program": (["--json", "train.py"], "Got --json train.py, the file of TARGET."),
    "the kernel's": (["--json", "/proc/a.json"], "--json must name a file that can be written."),
}


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(folder, case, command):
    arguments, text = UNWRITABLE[case]
    size = ["--microbatch-size", 4] if command == "check" else []
    outcome = invoked(command, "train.py:program", "--batch-size", 8, *size, *arguments)
    found = refused(outcome)
    assert text in found
    assert "it ran" not in found
    assert (folder / "old.json").read_text() == OLD
    assert sorted(file.name for file in folder.iterdir()) == [
        "around.json", "folder", "link.json", "old.json", "train.py",
    ]  # fmt: skip


def test_a_file_that_may_not_be_written_is_refused_before_the_work(folder, monkeypatch):
    # For root too, to whom the system refuses nothing.
    monkeypatch.setattr(os, "access", lambda file, how: False)
    text = refused(check("train.py:program", "--json", "old.json"))
    assert "Got --json old.json (Permission denied)." in text


@pytest.mark.parametrize("option", tiered(["--json", "--html"], ["--json"], "draws plots"))
def test_a_full_disk_leaves_the_old_report(folder, option):
    target = f"{PROGRAMS}:torch_program"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        outcome = check(target, option, "link.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.stdout.startswith("exact")
    assert f"Got {option} link.json (File too large). Any file there is unchanged" in refused(
        outcome
    )
    assert (folder / "old.json").read_text() == OLD
    assert not list(folder.glob(".*"))


def test_a_device_that_is_full_is_one_line():
    text = refused(check(f"{PROGRAMS}:torch_program", "--json", "/dev/full"))
    assert "(No space left on device)" in text


def test_a_report_is_replaced_with_its_mode_and_its_link(folder):
    outcome = check(f"{PROGRAMS}:torch_program", "--json", "link.json")
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((folder / "old.json").read_text())["exact"] is True
    assert (folder / "link.json").is_symlink()
    assert (folder / "old.json").stat().st_mode & 0o777 == 0o600


def test_a_device_is_written_as_it_is():
    assert check(f"{PROGRAMS}:torch_program", "--json", "/dev/null").exit_code == 0
    assert not Path("/dev/null").is_file()


def test_the_demo_leaves_the_old_report_too(folder, monkeypatch):
    def late(handle):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(cli, "run_demo", lambda *arguments: reports.demo())
    monkeypatch.setattr(os, "fsync", late)
    text = refused(invoked("demo", "--json", "old.json"))
    assert "Got --json old.json (Disk quota exceeded)." in text
    assert (folder / "old.json").read_text() == OLD


def test_an_answer_that_nobody_takes_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {})
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as ended:
        cli.app(["doctor"])
    with suppress(OSError):
        full.close()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("Error: OSError: [Errno 28] No space left on device")


@pytest.mark.thorough("starts the command twice, for what Python does at its end")
@pytest.mark.parametrize("where", ["/dev/full", "closed"])
def test_nor_does_python_say_otherwise_at_its_end(where):
    """A full disk behind the shell's arrow, or a pipe that was closed."""
    script = (
        "from virtualbatch.cli import app, doctor; doctor._DEVICE_SCRIPTS = {}; app.app(['doctor'])"
    )
    if where == "closed":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(where, os.O_WRONLY)
    command = [sys.executable, "-c", script]
    outcome = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )
    os.close(writer)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("Error: ")
    assert outcome.stderr.count("\n") == 1
