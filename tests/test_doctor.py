"""`virtualbatch doctor`: what it finds, and that nothing broken takes it down."""

import importlib.metadata
import json
import sys
from pathlib import Path

import psutil
import pytest

from virtualbatch.cli import doctor, trainers
from virtualbatch.cli.doctor import Framework
from virtualbatch.plan.host_memory import HostMemory, MemoryLimit, host_memory


@pytest.fixture(scope="module")
def diagnosis() -> doctor.Diagnosis:
    return doctor.diagnose()


def test_tensorflow_is_found_with_its_devices(diagnosis: doctor.Diagnosis) -> None:
    (tensorflow,) = (found for found in diagnosis.frameworks if found.name == "tensorflow")
    assert tensorflow.version == importlib.metadata.version("tensorflow")
    assert "CPU" in tensorflow.devices
    assert tensorflow.problem is None
    assert tensorflow.engine == "virtualbatch.tensorflow"
    assert diagnosis.packages["keras"] == importlib.metadata.version("keras")
    assert diagnosis.advice[-1] == "virtualbatch demo"


def test_text_and_json_say_the_same(diagnosis: doctor.Diagnosis) -> None:
    content = json.loads(diagnosis.to_json())
    assert content["memory"]["total_bytes"] == diagnosis.memory.total_bytes
    assert [found["name"] for found in content["frameworks"]] == ["tensorflow", "torch", "jax"]
    text = str(diagnosis)
    for part in (content["python"], *content["advice"], content["packages"]["numpy"]):
        assert part in text


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("raise ImportError('libbroken.so')", "ended with exit code 1: ImportError: libbroken.so"),
        ("import os; os.abort()", "ended with exit code -6: "),
        ("import time; time.sleep(60)", "did not name its devices within 1 s"),
    ],
)
def test_a_broken_framework_is_reported(
    monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {"tensorflow": script})
    diagnosis = doctor.diagnose(seconds_per_child=1 if "sleep" in script else 60)
    (tensorflow,) = diagnosis.frameworks
    assert tensorflow.devices == ()
    assert tensorflow.problem is not None
    assert tensorflow.problem.startswith(problem)
    assert diagnosis.advice[0].startswith(f"tensorflow is installed but {problem}")
    assert problem in str(diagnosis)


def test_what_the_framework_prints_does_not_hide_the_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "import sys; print('banner'); print('noise', file=sys.stderr); print('[\"GPU 0\"]')"
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {"tensorflow": script})
    (tensorflow,) = doctor.diagnose().frameworks
    assert tensorflow.devices == ("GPU 0",)


def test_variables_that_matter_are_shown_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {})
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    monkeypatch.setenv("UNRELATED_VARIABLE", "1")
    diagnosis = doctor.diagnose()
    assert diagnosis.variables["KERAS_BACKEND"] == "numpy"
    assert "UNRELATED_VARIABLE" not in diagnosis.variables
    assert any("unset TF_USE_LEGACY_KERAS" in line for line in diagnosis.advice)
    assert any("export KERAS_BACKEND=tensorflow" in line for line in diagnosis.advice)


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_a_backend_that_is_served_is_no_mistake(backend: str) -> None:
    assert doctor._advice((WORKING,), KERAS, {"KERAS_BACKEND": backend}) == ("virtualbatch demo",)


WORKING = Framework("tensorflow", "2.21.0", ("CPU",), None, "virtualbatch.tensorflow")
MISSING = Framework("tensorflow", None, (), None, "virtualbatch.tensorflow")
UNSERVED = Framework("torch", "2.13.0", ("CPU",), None, None)
KERAS = {"keras": "3.15.1", "scikit-learn": "1.9.1"}


@pytest.mark.parametrize(
    ("framework", "installed", "next_command"),
    [
        (WORKING, True, "virtualbatch demo"),
        (WORKING, False, 'pip install "virtualbatch[demo]" && virtualbatch demo'),
        (MISSING, True, 'pip install "virtualbatch[tensorflow]"'),
        (UNSERVED, True, 'pip install "virtualbatch[tensorflow]"'),
    ],
)
def test_the_next_command_fits_what_is_installed(
    framework: Framework, installed: bool, next_command: str
) -> None:
    packages = KERAS | {"scikit-learn": KERAS["scikit-learn"] if installed else None}
    assert doctor._advice((framework,), packages, {}) == (next_command,)


def test_a_missing_framework_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {"no_such_framework": "print([])"})
    monkeypatch.setattr(doctor.subprocess, "run", must_not_run)
    (framework,) = doctor.diagnose().frameworks
    assert framework == Framework("no_such_framework", None, (), None, None)


def write(root: Path, path: str, content: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def test_cgroup_v2_limits_of_every_level(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/outer/inner\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/outer/memory.max", "1048576\n")
    write(tmp_path, "sys/fs/cgroup/outer/inner/memory.max", "2097152\n")
    memory = host_memory(tmp_path)
    outer = MemoryLimit(str(tmp_path / "sys/fs/cgroup/outer/memory.max"), 2**20)
    inner = MemoryLimit(str(tmp_path / "sys/fs/cgroup/outer/inner/memory.max"), 2**21)
    assert [limit for limit in memory.limits if limit.source != "RLIMIT_AS"] == [outer, inner]
    assert memory.usable_bytes == 2**20


def test_cgroup_v1_limit_and_its_way_to_say_none(tmp_path: Path) -> None:
    group = "7:cpu:/a\n6:memory,hugetlb:/box\n"
    write(tmp_path, "proc/self/cgroup", group)
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "4194304\n")
    memory = host_memory(tmp_path)
    source = str(tmp_path / "sys/fs/cgroup/memory/box/memory.limit_in_bytes")
    assert memory.limits[0] == MemoryLimit(source, 2**22)
    assert memory.usable_bytes == 2**22


def test_no_cgroup_means_the_machine(tmp_path: Path) -> None:
    memory = host_memory(tmp_path)
    assert all(limit.source == "RLIMIT_AS" for limit in memory.limits)
    assert 0 < memory.available_bytes <= memory.total_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_a_resource_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**20, 2**20))
    assert host_memory(tmp_path).limits == (MemoryLimit("RLIMIT_AS", 2**20),)


def test_usable_memory_without_limits_is_the_machines() -> None:
    assert HostMemory(total_bytes=5, available_bytes=3, limits=()).usable_bytes == 5


def test_what_is_left_is_the_least_of_all_that_is_left(tmp_path: Path) -> None:
    kib = {"MemTotal": 4096, "MemFree": 1, "MemAvailable": 3072}
    write(tmp_path, "proc/meminfo", "".join(f"{name}: {n} kB\n" for name, n in kib.items()))
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.max", f"{2**21}\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.current", f"{2**20}\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.stat", "anon 5\ninactive_file 1000\n")
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes) == (2**22, 3 * 2**20)
    # What holds files is given back when it is needed.
    assert memory.left_bytes == 2**20 + 1000
    assert HostMemory(total_bytes=9, available_bytes=3, limits=()).left_bytes == 3
    full = MemoryLimit("RLIMIT_AS", 5, used_bytes=7)
    assert HostMemory(total_bytes=9, available_bytes=3, limits=(full,)).left_bytes == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_a_resource_limit_is_used_by_what_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    most = host_memory().total_bytes - 1
    monkeypatch.setattr(resource, "getrlimit", lambda which: (most, most))
    (limit,) = (limit for limit in host_memory().limits if limit.source == "RLIMIT_AS")
    has = psutil.Process().memory_info().vms
    assert has / 2 < limit.used_bytes < 2 * has


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> doctor.Diagnosis:
    monkeypatch.setattr(doctor, "_DEVICE_SCRIPTS", {})
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return doctor.diagnose()


def test_a_process_alone_is_in_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = launched(monkeypatch)
    assert diagnosis.process_group is None
    assert "\nprocess group\n  none, this process is alone\n" in str(diagnosis)
    assert not any("process" in line for line in diagnosis.advice)


def test_a_process_group_is_told_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = launched(monkeypatch, **LAUNCHED)
    assert json.loads(diagnosis.to_json())["process_group"] == LAUNCHED
    assert "\n  rank 1 of 2, which meet at 127.0.0.1:29500\n" in str(diagnosis)
    advice = "this is one of several processes: pass as module= the wrapper that sums"
    assert diagnosis.advice[0].startswith(advice)
    of_one = launched(monkeypatch, **LAUNCHED | {"RANK": "0", "WORLD_SIZE": "1"})
    assert not any("several processes" in line for line in of_one.advice)


def test_a_group_that_is_half_described_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = launched(monkeypatch, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    assert "rank ? of 2, which meet at 127.0.0.1:?" in str(diagnosis)
    assert diagnosis.advice[0] == (
        "the process group is incomplete, RANK and MASTER_PORT not set: start with torchrun, "
        "or unset the others"
    )


def test_trainers_are_told_with_what_serves_them(diagnosis: doctor.Diagnosis) -> None:
    found = {trainer.name: trainer for trainer in diagnosis.trainers}
    for name in ("transformers", "lightning"):
        assert found[name].version == importlib.metadata.version(name)
        assert found[name].is_served is True
        assert found[name].releases.startswith(">=")
        assert f"virtualbatch.{name}" in str(diagnosis)
    assert found["accelerate"].served_by == "virtualbatch.torch.loss"


@pytest.mark.parametrize(
    ("version", "is_served"), [("5.24.0", True), ("5.31", True), ("5.9.1", False), ("6.0.0", False)]
)
def test_a_release_that_was_not_tried_is_told(
    monkeypatch: pytest.MonkeyPatch, version: str, is_served: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (found,) = (each for each in trainers.installed_trainers() if each.name == "transformers")
    assert found.is_served == is_served
    assert ("not tried" in str(found)) != is_served
    advice = doctor._advice_of_trainers((found,))
    assert len(advice) == (0 if is_served else 1)


def test_a_trainer_that_is_absent_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = trainers.installed_trainers()
    assert all(each.version is None and each.is_served is None for each in found)
    assert doctor._advice_of_trainers(found) == ()
