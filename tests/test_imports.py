"""What an import may bring along: no framework in the core, no tool in the training paths.

Checked at run time in a fresh process, and statically by import-linter; each guard has a test
that it can fail.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("tensorflow", "keras", "torch", "jax")
TOOLS = ("typer", "rich", "psutil", "pandas", "sklearn", "jinja2", "matplotlib")


def assert_not_imported(program: str, forbidden: tuple[str, ...]) -> None:
    """Runs a program in a fresh process and raises if it imported what is forbidden."""
    report = f"import sys\nprint('|', *sorted(set({forbidden!r}) & set(sys.modules)))"
    child = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    imported = child.stdout.rsplit("|", 1)[1].split()
    if imported:
        raise AssertionError(f"{program!r} imported {imported}")


def test_the_package_imports_no_framework_and_no_tool() -> None:
    assert_not_imported("import virtualbatch", FRAMEWORKS + TOOLS)


@pytest.mark.parametrize(
    "module", ["window.window", "plan.planner", "certify.step", "noise.estimate"]
)
def test_core_modules_import_no_framework_and_no_tool(module: str) -> None:
    assert_not_imported(f"import virtualbatch.{module}", FRAMEWORKS + TOOLS)


@pytest.mark.parametrize("module", ["cli.app", "cli.doctor", "demo.parent", "__main__"])
def test_the_command_line_imports_no_framework(module: str) -> None:
    program = f"import virtualbatch.{module}"
    if module == "__main__":
        program = f"import sys\nsys.argv = ['virtualbatch', '--version']\ntry:\n    {program}"
        program += "\nexcept SystemExit: pass"
    assert_not_imported(program, FRAMEWORKS)


@pytest.mark.parametrize("module", ["cli.app", "report"])
def test_what_makes_a_page_is_imported_when_one_is_written(module: str) -> None:
    assert_not_imported(f"import virtualbatch.{module}", ("jinja2", "matplotlib"))


def test_a_report_imports_no_framework() -> None:
    program = """
from virtualbatch import Plan, PlanRow
from virtualbatch.report import write_html
row = PlanRow(32, 2**20, measured=True, seconds_per_batch=0.5)
write_html("/dev/null", Plan(32, 4, 2**21, "It fits.", (row,)))
"""
    assert_not_imported(program, (*FRAMEWORKS, "matplotlib.pyplot"))


def test_a_doctor_run_imports_no_framework() -> None:
    program = "import virtualbatch.cli.doctor\nprint(virtualbatch.cli.doctor.diagnose())"
    assert_not_imported(program, FRAMEWORKS)


@pytest.mark.parametrize("engine", ["tensorflow", "torch", "jax", "keras"])
def test_engines_import_no_tool_of_ours(engine: str) -> None:
    # The other tools Keras imports itself where it finds them, by way of scikit-learn too.
    assert_not_imported(f"import virtualbatch.{engine}", ("typer",))


def test_the_torch_engine_needs_no_other_framework() -> None:
    assert_not_imported("import virtualbatch.torch", ("tensorflow", "keras", "jax"))


def test_the_jax_engine_needs_no_other_framework() -> None:
    others = ("tensorflow", "keras", "torch", "optax", "flax", "equinox")
    assert_not_imported("import virtualbatch.jax", others)


@pytest.mark.parametrize("backend", ["torch", "jax"])
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
    assert_not_imported(program, engines)


def test_the_guard_can_fail() -> None:
    with pytest.raises(AssertionError, match=r"imported \['json'\]"):
        assert_not_imported("import json", ("json",))


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter with our contracts, on the package in `folder`/src."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src")},
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


@pytest.mark.parametrize(
    ("module", "poison", "contract"),
    [
        ("window/cut.py", "import tensorflow", "promises import no framework and no tool BROKEN"),
        ("plan/plan.py", "import rich", "promises import no framework and no tool BROKEN"),
        ("noise/advice.py", "import virtualbatch.keras", "engines on the four promises BROKEN"),
        ("window/cut.py", "import virtualbatch.plan.auto", "engines on the four promises BROKEN"),
        ("certify/step.py", "import virtualbatch.plan.auto", "engines on the four promises BROKEN"),
        ("tensorflow/__init__.py", "import torch", "its own framework only BROKEN"),
        (
            "torch/__init__.py",
            "import keras",
            "PyTorch engine imports its own framework only BROKEN",
        ),
        ("jax/__init__.py", "import optax", "JAX engine imports its own framework only BROKEN"),
        ("keras/__init__.py", "import psutil", "training paths import no tool BROKEN"),
        ("cli/app.py", "import virtualbatch.keras", "names an engine as a string BROKEN"),
        ("keras/__init__.py", "import virtualbatch.report", "engines on the four promises BROKEN"),
        ("report/_page.py", "import virtualbatch.torch", "names an engine as a string BROKEN"),
        ("stray.py", "", "engines on the four promises BROKEN"),
    ],
)
def test_each_import_contract_can_fail(
    copied_package: Path, module: str, poison: str, contract: str
) -> None:
    with (copied_package / module).open("a") as file:
        file.write(f"\n{poison}\n")
    outcome = lint_imports(copied_package.parent.parent)
    assert outcome.returncode != 0
    assert contract in outcome.stdout
