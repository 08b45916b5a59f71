"""Plans in a file: nothing is lost, nothing of others is touched, and training goes on."""

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.core.plans import Planner, plan, signature

from virtualbatch.plan import auto, file_lock
from virtualbatch.plan.auto import Auto
from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.plan_file import PlanFile
from virtualbatch.plan.plan_format import as_text, entries_in

FOR_ALL_THAT_IS_LEFT = f"None of {host_memory().usable_bytes} bytes"
TEXT = as_text([(signature()._replace(limit=FOR_ALL_THAT_IS_LEFT), plan())])
REFUSED = (
    r"^file must hold plans that Auto has written\. Got '.*plans\.json', in which .+\. "
    r"Remove the file, or pass another name\.$"
)


def edited(*path, value):
    """The file with one entry of its tree replaced."""
    found = json.loads(TEXT)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(found)


def without(*path):
    """The file without one entry of its tree."""
    found = json.loads(TEXT)
    place = found
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return json.dumps(found)


FIRST = ("plans", 0)
PLAN, SIGNATURE = (*FIRST, "plan"), (*FIRST, "signature")
ROW = (*PLAN, "rows", 0)
NAN, INFINITE = float("nan"), float("inf")
NO_SIZE = [0, -1, 1.5, True, None, "16", NAN, INFINITE, [16], {}]
NO_TEXT = [None, 3, ["a"]]
BAD = {
    **{f"size {v}": edited(*PLAN, "microbatch_size", value=v) for v in NO_SIZE},
    **{f"rows {v}": edited(*SIGNATURE, "rows", value=v) for v in NO_SIZE},
    **{f"limit {v}": edited(*PLAN, "memory_limit", value=v) for v in (0, -5, None, "2GiB", NAN)},
    **{f"peak {v}": edited(*ROW, "peak_bytes", value=v) for v in (-1, 0.5, "9", NAN)},
    **{f"time {v}": edited(*ROW, "seconds_per_batch", value=v) for v in (-1, "1", True, NAN)},
    **{f"measured {v}": edited(*ROW, "measured", value=v) for v in (1, None)},
    **{f"steps {v}": edited(*PLAN, "accumulation_steps", value=v) for v in (0, None)},
    **{f"program {v}": edited(*SIGNATURE, "program", value=v) for v in NO_TEXT},
    **{f"loss {v}": edited(*SIGNATURE, "loss", value=v) for v in NO_TEXT},
    **{f"leaves {v}": edited(*SIGNATURE, "leaves", value=v) for v in (None, {}, [1], ["abc"])},
    "a leaf of two": edited(*SIGNATURE, "leaves", 0, value=["x", [1]]),
    "a negative shape": edited(*SIGNATURE, "leaves", 0, 1, value=[-4]),
    "a shape of text": edited(*SIGNATURE, "leaves", 0, 1, value=["4"]),
    "a shape that is none": edited(*SIGNATURE, "leaves", 0, 1, value=4),
    "a reason that breaks the line": edited(*PLAN, "reason", value="It fits.\nERROR: not"),
    "a reason that is no text": edited(*PLAN, "reason", value="\ud800"),
    "rows that are no list": edited(*PLAN, "rows", value={"0": 1}),
    "a row that is none": edited(*ROW, value=None),
    "another name": edited(*PLAN, "micro_batch", value=3),
    **{f"no {key}": without(*FIRST, key) for key in ("plan", "signature")},
    "no loss": without(*SIGNATURE, "loss"),
    "no reason": without(*PLAN, "reason"),
    "no times": without(*ROW, "seconds_per_batch"),
    "no plans": without("plans"),
    "no version": without("version"),
    **{f"version {v}": edited("version", value=v) for v in (1, 3, True, "2", None)},
    "another format": edited("format", value="plans"),
    **{f"plans {v}": edited("plans", value=v) for v in (None, {}, "", [None], [[]], [1])},
    "more at the top": edited("more", value=1),
    "a name twice": TEXT.replace('"version": 2', '"version": 2, "version": 2'),
    "a number of 5,000 digits": TEXT.replace('_size": 16', '_size": ' + 5000 * "9"),
    "an infinite number": TEXT.replace('"seconds_per_batch": 0.5', '"seconds_per_batch": 1e999'),
    **{f"cut at {n} of 10": TEXT[: len(TEXT) * n // 10] for n in (1, 3, 5, 7, 9)},
    "all but the last sign": TEXT.rstrip()[:-1],
    "twice": TEXT + TEXT,
    "a word": "plans",
    "somebody's object": "{}",
    "somebody's list": "[]",
    "somebody's numbers": "[1, 2]",
    "somebody's number": "3",
    "null": "null",
    "somebody's text": "microbatch_size: 16\n",
    "a list of nothing known": '[{"signature": {}}]',
    "lists in lists": 100_000 * "[",
    "a mark of byte order": "\ufeff" + TEXT,
    "bytes": b"\x80\x04\x95\x00",
    "zeros": bytes(100),
    "UTF-16": TEXT.encode("utf-16"),
}  # fmt: skip
OLD = json.dumps(json.loads(TEXT)["plans"])
GOOD = {
    "ours": (TEXT, True),
    "set out otherwise": (json.dumps(json.loads(TEXT), indent=4) + "\n", True),
    "of the first version": (OLD, True),
    "empty": ("", False),
    "a line": ("\n", False),
    "no plan": (edited("plans", value=[]), False),
    "a time that was not taken": (edited(*ROW, "seconds_per_batch", value=None), True),
    "letters": (edited(*SIGNATURE, "leaves", 0, 0, value="batch['größe']"), False),
}


def written(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file.read_bytes()


def test_there_are_as_many_contents_as_the_attack_had():
    assert len(BAD) + len(GOOD) >= 65


@pytest.mark.parametrize("content", BAD.values(), ids=[name[:40] for name in BAD])
def test_what_auto_has_not_written_is_refused_before_anything_is_planned(tmp_path, content):
    file = tmp_path / "plans.json"
    before = written(file, content)
    with pytest.raises(ValueError, match=REFUSED) as raised:
        Auto(file=file)
    assert len(str(raised.value)) < 400
    assert file.read_bytes() == before


@pytest.mark.parametrize(("content", "known"), GOOD.values(), ids=GOOD)
def test_what_it_has_written_or_nothing_is_read(tmp_path, content, known):
    file = tmp_path / "plans.json"
    written(file, content)
    planner = Planner(4)
    assert Auto(file=file).planned(signature(), planner).rows == (16 if known else 4)
    assert (planner.sizes == []) is not known
    assert Auto(file=file).planned(signature(), Planner()).rows == (16 if known else 4)


def test_a_plan_comes_back_as_it_was_made():
    entries = [(signature(), plan()), (signature(loss="loss 2"), plan(8))]
    assert entries_in(as_text(entries).encode()) == entries


def test_plans_are_kept_in_a_file(tmp_path, caplog):
    file = tmp_path / "plans.json"
    Auto(file=file).planned(signature(), Planner(16))
    Auto(file=file).planned(signature(loss="loss 2"), Planner(8))
    with caplog.at_level(logging.INFO, "virtualbatch"):
        again = Auto(file=str(file))
        assert again.planned(signature(), Planner()).rows == 16
        assert again.planned(signature(loss="loss 2", rows=9), Planner()).rows == 8
    assert [found.name for found in tmp_path.iterdir()] == ["plans.json"]
    assert (
        "microbatch_size=16 for batches of up to 64 rows, memory limit 1.0 MiB (from "
        in (caplog.messages[0])
    )


def test_plans_of_earlier_versions_are_made_anew(tmp_path):
    file = tmp_path / "plans.json"
    (entry,) = json.loads(OLD)
    del entry["signature"]["loss"], entry["signature"]["limit"]
    file.write_text(json.dumps([entry]))
    assert Auto(file=file).planned(signature(), Planner(4)).rows == 4
    assert len(json.loads(file.read_text())["plans"]) == 1


@pytest.mark.parametrize(("limit", "again"), [(None, True), ("80%", True), ("2GiB", False)])
def test_what_is_left_of_another_machine_is_planned_anew(tmp_path, monkeypatch, limit, again):
    file = tmp_path / "plans.json"
    Auto(file=file, memory_limit=limit).planned(signature(), Planner(16))
    monkeypatch.setattr(auto, "_host_bytes", lambda: 2**30)
    found = Auto(file=file, memory_limit=limit).planned(signature(), Planner(4))
    assert found.rows == (4 if again else 16)


def sizes_in(file):
    return [entry[1].microbatch_size for entry in PlanFile(file).plans]


def test_a_plan_that_another_covers_is_dropped(tmp_path):
    file = tmp_path / "plans.json"
    for rows, size in ((64, 16), (32, 8), (128, 4)):
        PlanFile(file).add(signature(rows=rows), plan(size))
        PlanFile(file).add(signature(loss="loss 2"), plan(2))
        # The plan for 32 rows is covered by the one that is there.
        assert sizes_in(file) == ([16, 2] if rows < 128 else [4, 2])


# Each writes plans of its own into one file after another, and waits for the other in between.
WRITER = """
import sys, time
from pathlib import Path
from tests.core.plans import plan, signature
from virtualbatch.plan.plan_file import PlanFile

folder, me, runs, plans = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for run in range(runs):
    file = PlanFile(folder / f"{run}.json")
    (folder / f"{run}-{me}").touch()
    while not all((folder / f"{run}-{who}").exists() for who in "ab"):
        time.sleep(0)
    for k in range(plans):
        file.add(signature(loss=f"loss {me} {k}"), plan())
"""


@pytest.mark.parametrize(
    "runs", [2, pytest.param(50, marks=pytest.mark.thorough("as often as the attack was made"))]
)
def test_two_processes_lose_no_plan(tmp_path, runs):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, who, str(runs), "5"]) for who in "ab"]
    assert [writer.wait(timeout=200) for writer in writers] == [0, 0]
    losses = {f"loss {who} {k}" for who in "ab" for k in range(5)}
    lost = {
        run: losses - {entry[0].loss for entry in PlanFile(tmp_path / f"{run}.json").plans}
        for run in range(runs)
    }
    assert {run: missing for run, missing in lost.items() if missing} == {}
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ""}


@pytest.mark.parametrize(
    "calls", [40, pytest.param(200, marks=pytest.mark.thorough("as often as the attack was made"))]
)
@pytest.mark.parametrize("shared", [False, True])
def test_threads_lose_no_plan(tmp_path, calls, shared, caplog):
    name = tmp_path / "plans.json"
    one = PlanFile(name)
    failed = []

    def write(thread):
        try:
            for k in range(calls // 8):
                file = one if shared else PlanFile(name)
                file.add(signature(loss=f"loss {thread} {k}"), plan())
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failed, caplog.messages) == ([], [])
    assert len(PlanFile(name).plans) == calls
    assert [found.name for found in tmp_path.iterdir()] == ["plans.json"]


def test_mode_and_link_stay(tmp_path):
    (tmp_path / "shared").mkdir()
    target, link = tmp_path / "shared" / "real.json", tmp_path / "plans.json"
    target.write_text(TEXT)
    target.chmod(0o600)
    link.symlink_to(target)
    PlanFile(link).add(signature(loss="loss 2"), plan(8))
    assert link.is_symlink()
    assert os.readlink(link) == str(target)
    assert sizes_in(target) == [16, 8]
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        PlanFile(tmp_path / "plans.json").add(signature(), plan())
    finally:
        os.umask(before)
    assert (tmp_path / "plans.json").stat().st_mode & 0o777 == 0o640


def test_what_became_something_else_is_not_replaced(tmp_path, caplog):
    file = tmp_path / "plans.json"
    size = Auto(file=file)
    file.write_text('{"somebody": "else"}')
    assert size.planned(signature(), Planner(16)).rows == 16
    assert file.read_text() == '{"somebody": "else"}'
    (message,) = caplog.messages
    assert message.startswith(f"Plans are kept in memory only, because {file} could not be written")
    assert "no format=" in message


class Unwritable:
    """Ways in which a file cannot be written, which hold for every user."""

    @staticmethod
    def gone(file, monkeypatch):
        file.parent.rmdir()

    @staticmethod
    def read_only(file, monkeypatch):
        file.write_text(TEXT)
        access = os.access
        monkeypatch.setattr(os, "access", lambda name, how: not how & os.W_OK and access(name, how))

    @staticmethod
    def locked(file, monkeypatch):
        monkeypatch.setattr(file_lock, "PATIENCE", 0.02)
        lock = os.open(file.with_name(".plans.json.lock"), os.O_RDWR | os.O_CREAT)
        file_lock.fcntl.flock(lock, file_lock.fcntl.LOCK_EX)

    @staticmethod
    def full(file, monkeypatch):
        def late(handle):
            raise OSError(errno.ENOSPC, "No space left")

        file.write_text(TEXT)
        monkeypatch.setattr(os, "fsync", late)


WAYS = {
    "gone": "No such file or directory",
    "read_only": "Permission denied",
    "locked": "its lock is held by others",
    "full": "No space left",
}


@pytest.mark.parametrize("way", WAYS)
def test_where_it_cannot_be_written_one_line_says_so_and_training_goes_on(
    tmp_path, monkeypatch, caplog, way
):
    file = tmp_path / "folder" / "plans.json"
    file.parent.mkdir()
    size = Auto(file=file)
    getattr(Unwritable, way)(file, monkeypatch)
    before = file.read_bytes() if file.exists() else None
    for loss in ("a", "b", "b"):
        assert size.planned(signature(loss=loss), Planner(8)).rows == 8
    assert caplog.messages == [
        f"Plans are kept in memory only, because {file} could not be written: {WAYS[way]}"
    ]
    assert before == (file.read_bytes() if file.exists() else None)
    if file.parent.exists():
        assert {found.name for found in file.parent.iterdir()} <= {"plans.json", ".plans.json.lock"}


def test_a_full_disk_leaves_the_old_plans(tmp_path, caplog):
    # The kernel itself refuses the bytes beyond the limit.
    file = tmp_path / "plans.json"
    file.write_text(TEXT)
    found = PlanFile(file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(TEXT) + 10, limits[1]))
    try:
        found.add(signature(loss="loss 2"), plan(8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in caplog.text
    assert file.read_text() == TEXT
    # What could not be written is not forgotten.
    found.add(signature(loss="loss 3"), plan(4))
    assert sizes_in(file) == [16, 8, 4]
    assert len(caplog.messages) == 1


def test_a_lock_that_a_killed_process_left_is_no_lock(tmp_path):
    (tmp_path / ".plans.json.lock").touch()
    PlanFile(tmp_path / "plans.json").add(signature(), plan())
    assert [found.name for found in tmp_path.iterdir()] == ["plans.json"]


def test_without_locks_plans_are_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(file_lock.fcntl, "flock", unsupported)
    PlanFile(tmp_path / "plans.json").add(signature(), plan())
    assert [found.name for found in tmp_path.iterdir()] == ["plans.json"]


def test_an_interrupt_leaves_the_old_plans_and_no_lock(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    file.write_text(TEXT)
    monkeypatch.setattr(os, "fsync", lambda handle: signal.raise_signal(signal.SIGINT))
    # What a shell starts in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            PlanFile(file).add(signature(loss="loss 2"), plan(8))
    finally:
        signal.signal(signal.SIGINT, before)
    assert file.read_text() == TEXT
    assert [found.name for found in tmp_path.iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    ("name", "text"),
    {
        "a folder": (".", r"must name a file\. Got '.*', a folder\. Pass for example"),
        "no folder": ("no/such/plans.json", r"in a folder that exists\. Got '.*'\. Make the"),
        "a device": ("/dev/full", r"Got '/dev/full', a device or a pipe\."),
        "a file as folder": ("file/plans.json", r"readable\. Got '.*' \(Not a directory\)\."),
        "links that meet": ("around", r"must be readable\. Got '.*' \(Too many levels of symbolic"),
        "a long name": (300 * "a", r"must be readable\. Got '.*' \(File name too long\)\."),
        "zero": ("a\0b", r"must be readable\. Got '.*' \(.*embedded null .*\)\."),
    }.values(),
)  # fmt: skip
def test_names_of_no_file_are_refused(tmp_path, name, text):
    (tmp_path / "file").touch()
    (tmp_path / "around").symlink_to(tmp_path / "around")
    with pytest.raises(ValueError, match=text):
        Auto(file=tmp_path / name)


@pytest.mark.parametrize("name", [3, b"plans.json", ["plans.json"], True])
def test_names_of_another_kind_are_refused(name):
    with pytest.raises(TypeError, match=r"file must be the name of a file, or None\. Got \w+\. P"):
        Auto(file=name)


def test_a_link_to_nothing_yet_is_followed(tmp_path):
    link = tmp_path / "plans.json"
    link.symlink_to("real.json")
    Auto(file=link).planned(signature(), Planner(16))
    assert link.is_symlink()
    assert sizes_in(Path(tmp_path / "real.json")) == [16]


def test_owner_and_group_stay_where_the_user_may_give_them(tmp_path, monkeypatch):
    asked = []

    def refused(file, owner, group):
        asked.append((owner, group))
        raise PermissionError

    file = tmp_path / "plans.json"
    file.write_text(TEXT)
    file.chmod(0o640)
    before = file.stat()
    monkeypatch.setattr(os, "chown", refused)
    PlanFile(file).add(signature(loss="loss 2"), plan(8))
    assert asked == [(-1, before.st_gid), (before.st_uid, -1)]
    assert file.stat().st_mode & 0o777 == 0o640
