"""`virtualbatch doctor`: shows installed packages, devices, processes, memory limits and advice.

Packages are found without importing them. Devices are listed in one child process per framework, so
that a broken framework does not break the whole report.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from virtualbatch import __version__
from virtualbatch.cli.trainers import Trainer, installed_trainers
from virtualbatch.plan.host_memory import HostMemory, host_memory

SECONDS_PER_CHILD = 120

# Each script prints one JSON list as its last line, after anything that the framework prints.
_DEVICE_SCRIPTS = {
    "tensorflow": """
import json, tensorflow as tf
devices = [tf.config.experimental.get_device_details(d).get("device_name", d.name)
           if d.device_type == "GPU" else d.device_type for d in tf.config.list_physical_devices()]
print(json.dumps(devices))
""",
    "torch": """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
devices += ["MPS"] if torch.backends.mps.is_available() else []
print(json.dumps(["CPU", *devices]))
""",
    "jax": """
import json, jax
print(json.dumps([f"{d.device_kind} {d.id}" for d in jax.devices()]))
""",
}
_CHILD_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # Listing a device must not fill its memory.
    "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_PACKAGES = {
    "keras": "keras",
    "numpy": "numpy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
}
_KERAS_BACKENDS = ("tensorflow", "jax", "torch")
_VARIABLES = (
    "KERAS_BACKEND",
    "KERAS_HOME",
    "TF_USE_LEGACY_KERAS",
    "TF_CPP_MIN_LOG_LEVEL",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_CPU_ALLOCATOR_USE_BFC",
    "TF_CPU_BFC_MEM_LIMIT_IN_MB",
    "TF_NUM_INTEROP_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_DETERMINISTIC_OPS",
    "TF_XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)
# Variables that launchers such as torchrun set for each process.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Framework:
    """The installation of one framework.

    Args:
        name: the name of its module.
        version: the installed version; None if it is not installed.
        devices: the devices on which it can compute, by the framework's names.
        problem: why it did not start; None if it started or is not installed.
        engine: the module of virtualbatch for it; None if there is none.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    problem: str | None
    engine: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `virtualbatch doctor` found.

    Args:
        virtualbatch: the version of virtualbatch.
        python: the version of Python.
        platform: operating system and machine.
        frameworks: TensorFlow, torch and JAX, installed or not.
        trainers: trainers for PyTorch, installed or not, and whether they are supported.
        packages: other package -> its version; None if it is not installed.
        process_group: variables that a launcher set about the group of processes; None without a
            launcher.
        memory: the memory of the host, and the limits on this process.
        variables: environment variables that are set and affect the frameworks.
        advice: problems first, then what to run next.
    """

    virtualbatch: str
    python: str
    platform: str
    frameworks: tuple[Framework, ...]
    trainers: tuple[Trainer, ...]
    packages: Mapping[str, str | None]
    process_group: Mapping[str, str] | None
    memory: HostMemory
    variables: Mapping[str, str]
    advice: tuple[str, ...]

    def to_json(self) -> str:
        """The findings as JSON text."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"virtualbatch {self.virtualbatch}, Python {self.python}, {self.platform}",
            "",
            "frameworks",
            *(f"  {line}" for framework in self.frameworks for line in _describe(framework)),
            "",
            "trainers",
            *(f"  {trainer}" for trainer in self.trainers),
            "",
            "packages",
            *(f"  {name:<14}{version or 'no'}" for name, version in self.packages.items()),
            "",
            "process group",
            f"  {_describe_group(self.process_group)}",
            "",
            "memory",
            f"  {'total':<14}{_gibibytes(self.memory.total_bytes)}",
            f"  {'available':<14}{_gibibytes(self.memory.available_bytes)}",
            *(
                f"  {'limit':<14}{_gibibytes(limit.limit_bytes)} ({limit.source})"
                for limit in self.memory.limits
            ),
            *(() if self.memory.limits else (f"  {'limit':<14}none",)),
            "",
            "environment",
            *(f"  {name}={value}" for name, value in self.variables.items()),
            *(() if self.variables else ("  nothing set that matters here",)),
            "",
            "next",
            *(f"  {line}" for line in self.advice),
        ]
        return "\n".join(lines)


def diagnose(seconds_per_child: float = SECONDS_PER_CHILD) -> Diagnosis:
    """Inspects this machine, without importing a framework into this process.

    Args:
        seconds_per_child: the time limit for a framework to list its devices.
    """
    frameworks = tuple(_framework(name, seconds_per_child) for name in _DEVICE_SCRIPTS)
    packages = {name: _version(name, module) for name, module in _PACKAGES.items()}
    trainers = installed_trainers()
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    group = {name: os.environ[name] for name in _LAUNCHED if name in os.environ} or None
    return Diagnosis(
        virtualbatch=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        frameworks=frameworks,
        trainers=trainers,
        packages=packages,
        process_group=group,
        memory=host_memory(),
        variables=variables,
        advice=(
            *_advice_of_group(group),
            *_advice_of_trainers(trainers),
            *_advice(frameworks, packages, variables),
        ),
    )


def _framework(name: str, seconds: float) -> Framework:
    version = _version(name, name)
    engine = f"virtualbatch.{name}"
    devices: tuple[str, ...] = ()
    problem = None
    if version is not None:
        devices, problem = _devices(name, _DEVICE_SCRIPTS[name], seconds)
    return Framework(
        name=name,
        version=version,
        devices=devices,
        problem=problem,
        engine=engine if importlib.util.find_spec(engine) else None,
    )


def _devices(name: str, script: str, seconds: float) -> tuple[tuple[str, ...], str | None]:
    """Devices that a child process lists, or the reason why it lists none."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=seconds,
            env=_CHILD_ENVIRONMENT | os.environ,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (), f"did not name its devices within {seconds:g} s"
    if child.returncode != 0:
        last_lines = child.stderr.strip().splitlines()[-1:]
        return (), f"ended with exit code {child.returncode}: {''.join(last_lines)}"
    return tuple(json.loads(child.stdout.splitlines()[-1])), None


def _version(distribution: str, module: str) -> str | None:
    """The installed version, "unknown" without metadata, None if it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # It is a build under another name (tensorflow-cpu), or a plain folder on the path.
        return "unknown"


def _advice(
    frameworks: tuple[Framework, ...],
    packages: Mapping[str, str | None],
    variables: Mapping[str, str],
) -> tuple[str, ...]:
    advice = [
        f"{framework.name} is installed but {framework.problem}. Reinstall it: "
        f"pip install --force-reinstall {framework.name}"
        for framework in frameworks
        if framework.problem
    ]
    if variables.get("TF_USE_LEGACY_KERAS") not in (None, "0"):
        advice.append("tf.keras is Keras 2 now, which is not supported: unset TF_USE_LEGACY_KERAS")
    backend = variables.get("KERAS_BACKEND", "tensorflow")
    if backend not in _KERAS_BACKENDS:
        advice.append(
            f"Keras runs on {backend} now, which virtualbatch.keras does not serve: "
            "export KERAS_BACKEND=tensorflow, or jax, or torch"
        )
    works = any(framework.engine and framework.devices for framework in frameworks)
    if works and packages["keras"] and packages["scikit-learn"]:
        advice.append("virtualbatch demo")
    elif works:
        advice.append('pip install "virtualbatch[demo]" && virtualbatch demo')
    elif not any(framework.problem for framework in frameworks):
        advice.append('pip install "virtualbatch[tensorflow]"')
    return tuple(advice)


def _advice_of_group(group: Mapping[str, str] | None) -> tuple[str, ...]:
    if group is None:
        return ()
    if absent := [name for name in _LAUNCHED if name not in group]:
        return (
            f"the process group is incomplete, {' and '.join(absent)} not set: start with "
            "torchrun, or unset the others",
        )
    if group["WORLD_SIZE"] == "1":
        return ()
    return (
        "this is one of several processes: pass as module= the wrapper that sums their gradients, "
        "such as DistributedDataParallel, see docs/guides/processes.md",
    )


def _advice_of_trainers(trainers: tuple[Trainer, ...]) -> tuple[str, ...]:
    return tuple(
        f"{found.name} {found.version} was not tried with virtualbatch: "
        f'pip install "{found.name}{found.releases}"'
        for found in trainers
        if found.is_served is False
    )


def _describe(framework: Framework) -> list[str]:
    if framework.version is None:
        return [f"{framework.name:<14}no"]
    served = framework.engine or "no engine for it yet"
    found = ", ".join(framework.devices) or framework.problem
    return [
        f"{framework.name:<14}{framework.version}, {served}",
        f"{'':<14}devices: {found}",
    ]


def _describe_group(group: Mapping[str, str] | None) -> str:
    if group is None:
        return "none, this process is alone"
    rank, size, host, port = (group.get(name, "?") for name in _LAUNCHED)
    return f"rank {rank} of {size}, which meet at {host}:{port}"


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
