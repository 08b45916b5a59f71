"""What an import may bring along: no framework in the core, no tool in the training paths.

Checked at run time in a fresh process, and statically by import-linter; each guard has a test
that it can fail.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiers import tiered

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("tensorflow", "keras", "torch", "jax")
TOOLS = ("typer", "rich", "psutil", "pandas", "sklearn", "jinja2", "matplotlib")

RUN = """
import json, sys
for program, forbidden in json.loads(sys.argv[1]):
    exec(program, {"__name__": "__main__"})
    if imported := sorted(set(forbidden) & set(sys.modules)):
        raise SystemExit(f"{program!r} imported {imported}")
"""


def assert_not_imported(*steps: tuple[str, tuple[str, ...]]) -> None:
    """Runs programs, one after another in a fresh process, and raises at what is forbidden.

    Args:
        steps: a program, and what must not have been imported when it has run. A later step must
            not forbid what an earlier one allows.
    """
    child = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(steps)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if child.returncode != 0:
        raise AssertionError(child.stderr)


REPORT = """
from virtualbatch import Plan, PlanRow
from virtualbatch.report import write_html
row = PlanRow(32, 2**20, measured=True, seconds_per_batch=0.5)
write_html("/dev/null", Plan(32, 4, 2**21, "It fits.", (row,)))
"""
VERSION = """
import sys
sys.argv = ["virtualbatch", "--version"]
try:
    import virtualbatch.__main__
except SystemExit:
    pass
"""
# The children, which do import a framework, are those of tests/test_doctor.py.
DOCTOR = """
from virtualbatch.cli import doctor
doctor._DEVICE_SCRIPTS = dict.fromkeys(doctor._DEVICE_SCRIPTS, "print('[]')")
print(doctor.diagnose())
"""


def test_the_core_imports_no_framework_and_no_tool_and_the_command_no_framework() -> None:
    page = (*FRAMEWORKS, "jinja2", "matplotlib")
    assert_not_imported(
        ("import virtualbatch", FRAMEWORKS + TOOLS),
        *(
            (f"import virtualbatch.{module}", FRAMEWORKS + TOOLS)
            for module in ("window.window", "plan.planner", "certify.step", "noise.estimate")
        ),
        # What makes a page is imported when one is written.
        *((f"import virtualbatch.{module}", page) for module in ("cli.app", "report")),
        *(
            (f"import virtualbatch.{module}", FRAMEWORKS)
            for module in ("cli.doctor", "demo.parent")
        ),
        (VERSION, FRAMEWORKS),
        (DOCTOR, FRAMEWORKS),
        (REPORT, (*FRAMEWORKS, "matplotlib.pyplot")),
    )


@pytest.mark.parametrize(
    ("engine", "others"),
    [
        # The other tools Keras imports itself where it finds them, by way of scikit-learn too.
        # The compiler of PyTorch takes a second, and is for those who compile.
        ("torch", ("typer", "tensorflow", "keras", "jax", "torch._dynamo")),
        ("jax", ("typer", "tensorflow", "keras", "torch", "optax", "flax", "equinox")),
        # An engine knows trainers by `sys.modules` only.
        ("torch", ("accelerate", "lightning", "torchmetrics", "transformers")),
        ("transformers", ("keras", "jax", "lightning", "trl", "peft")),
        ("lightning", ("keras", "jax", "accelerate", "trl", "peft")),
    ],
)
def test_an_engine_needs_no_other_framework(engine: str, others: tuple[str, ...]) -> None:
    assert_not_imported((f"import virtualbatch.{engine}", others))


@pytest.mark.parametrize(
    "backend", tiered(["tensorflow", "torch", "jax"], ["tensorflow"], "loads Keras once more")
)
def test_keras_imports_the_engine_of_its_backend_only(backend: str) -> None:
    # Keras itself imports other frameworks for its data adapters.
    program = f"""
import os
os.environ["KERAS_BACKEND"] = "{backend}"
import keras, virtualbatch.keras
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
virtualbatch.keras.accumulate(model, microbatch_size=2)
"""
    engines = tuple(
        f"virtualbatch.{name}" for name in ("tensorflow", "torch", "jax") if name != backend
    )
    assert_not_imported((program, ("typer", *engines)))


def test_the_guard_can_fail() -> None:
    with pytest.raises(AssertionError, match=r"'import json' imported \['json'\]"):
        assert_not_imported(("import sys", ("typer",)), ("import json", ("json",)))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with our contracts, on the package in `folder`/src."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    package = tmp_path / "src" / "virtualbatch"
    shutil.copytree(
        ROOT / "src" / "virtualbatch", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    return package


def test_the_import_contracts_hold(copied_package: Path) -> None:
    outcome = lint_imports(copied_package.parent.parent)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


DIRECTION = "Tools stand on Keras and trainers, they on the engines, those on the four promises"
CORE = "The promises import no framework and no tool"
COMMAND = "The command line names an engine as a string"
TRAINER = "The adapter of the Hugging Face Trainer imports its own trainer only"
LIGHTNING = "The adapter of Lightning imports its own trainer only"
# (module, what it imports, the contract that this breaks)
POISONS = [
    ("window.cut", "tensorflow", CORE),
    ("plan.plan", "rich", CORE),
    ("noise.advice", "virtualbatch.keras", DIRECTION),
    ("window.cut", "virtualbatch.plan.auto", DIRECTION),
    ("certify.step", "virtualbatch.plan.auto", DIRECTION),
    ("tensorflow._aux", "torch", "An engine imports its own framework only"),
    ("torch._aux", "keras", "The PyTorch engine imports its own framework only"),
    ("torch._aux", "accelerate", "The PyTorch engine imports its own framework only"),
    ("transformers._rows", "trl", TRAINER),
    ("lightning._kept", "transformers", LIGHTNING),
    ("jax._aux", "optax", "The JAX engine imports its own framework only"),
    ("keras._noise", "psutil", "The training paths import no tool"),
    ("keras._noise", "virtualbatch.report", DIRECTION),
    ("cli.app", "virtualbatch.keras", COMMAND),
    ("report._page", "virtualbatch.torch", COMMAND),
]


def test_each_import_contract_can_fail(copied_package: Path) -> None:
    for module, imported, _ in POISONS:
        with (copied_package / f"{module.replace('.', '/')}.py").open("a") as file:
            file.write(f"\nimport {imported}\n")
    (copied_package / "stray.py").touch()
    outcome = lint_imports(copied_package.parent.parent)
    assert outcome.returncode != 0
    # Behind the summary each broken contract has a section of its own.
    titles = re.split(r"^(.+)\n-{5,}\n", outcome.stdout, flags=re.MULTILINE)
    sections = dict(zip(titles[1::2], titles[2::2], strict=True))
    for module, imported, contract in POISONS:
        assert f"virtualbatch.{module} -> {imported} (l." in sections[contract], outcome.stdout
    assert "stray" in sections[DIRECTION]
