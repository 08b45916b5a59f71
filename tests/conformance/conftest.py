"""Which engines run, and the table of what they proved."""

from pathlib import Path

import pytest
from tests.conformance import table
from tests.conformance.adapters.base import ENGINES, load, selected

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "how_it_works" / "conformance.md"


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
        # A page that is written comes from what really ran.
        self.quick = config.option.markexpr == "not thorough" and not self.path

    def _passed(self, item):
        params = item.callspec.params
        self.passed[params["engine_name"]].append(params["case"].feature)

    def pytest_deselected(self, items):
        left_out = [item for item in items if item.path.is_relative_to(HERE)]
        if self.quick and all(item.get_closest_marker("thorough") for item in left_out):
            # The table is that of a whole run, which `make test-all` has; here they count as if
            # they had passed, so that the quick tier sees a page that is stale.
            for item in left_out:
                self._passed(item)
        else:
            self.complete &= not left_out

    def pytest_collection_finish(self, session):
        files = {item.path for item in session.items}
        self.complete &= files >= set(HERE.glob("test_*.py"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if case is not None and item.path.is_relative_to(HERE):
            if report.when == "call" and report.passed:
                self._passed(item)
            self.complete &= not report.failed
        return report

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.stale:
            terminalreporter.write_line(f"{PAGE.name} is stale: {line}", red=True)

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
