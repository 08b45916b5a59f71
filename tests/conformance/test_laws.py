"""Every law on every engine."""

import pytest
from tests.conformance.adapters.base import selected
from tests.conformance.cases import CASES, applies


def marks(case):
    return [pytest.mark.thorough(case.thorough)] if case.thorough else []


def pytest_generate_tests(metafunc):
    # One engine after another, so that each framework is loaded when its own turn comes.
    metafunc.parametrize(
        ("engine_name", "case"),
        [
            pytest.param(name, case, id=f"{name}: {case.id}", marks=marks(case))
            for name in selected(metafunc.config)
            for case in CASES
            if applies(case, name)
        ],
        scope="session",
    )


def test_law(engine, case):
    case.run(engine)
