"""Which engines run, and the table of what they proved."""

from pathlib import Path

import pytest
from tests.conformance import table
from tests.conformance.adapters.base import ENGINES, load, selected

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "conformance.md"


def pytest_addoption(parser):
    parser.addoption("--engine", choices=["all", *ENGINES], help="the engine to run; default: all")
    parser.addoption("--write-table", metavar="PATH", help="write the table of features there")


@pytest.fixture(scope="session")
def adapter(engine_name):
    """The adapter of an engine. A framework that is missing is a failure, never a skip."""
    return load(engine_name)


@pytest.fixture
def engine(adapter):
    with adapter.settings():
        yield adapter


class Run:
    """What passed, and whether nothing was left out."""

    def __init__(self, config):
        self.engines = selected(config)
        self.path = config.getoption("--write-table", None)
        self.passed = {engine: [] for engine in self.engines}
        self.complete = not any("::" in str(argument) for argument in config.args)

    def pytest_deselected(self, items):
        self.complete &= not any(item.path.is_relative_to(HERE) for item in items)

    def pytest_collection_finish(self, session):
        files = {item.path for item in session.items}
        self.complete &= files >= set(HERE.glob("test_*.py"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if case is not None and item.path.is_relative_to(HERE):
            if report.when == "call" and report.passed:
                self.passed[item.callspec.params["engine_name"]].append(case.feature)
            self.complete &= not report.failed
        return report

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.stale:
            terminalreporter.write_line(f"docs/conformance.md is stale: {line}", red=True)

    stale: tuple = ()

    def pytest_sessionfinish(self, session):
        # A part of the suite says nothing about the table, and a failure says enough.
        if not self.complete or session.config.option.collectonly:
            return
        if self.path:
            Path(self.path).write_text(table.page(self.passed))
            return
        self.stale = table.differences(PAGE.read_text(), self.passed, self.engines)
        if self.stale:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config):
    config.pluginmanager.register(Run(config), "conformance-run")
