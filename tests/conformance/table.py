"""The table of how_it_works/conformance.md: what the suite's run proved, by feature and engine."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tests.conformance.adapters.base import ENGINES
from tests.conformance.cases import CASES, DOES_NOT_APPLY

TITLES = {
    "tensorflow": "TensorFlow",
    "torch": "PyTorch",
    "torch_loss": "PyTorch, `loss`",
    "jax": "JAX",
}
HEADING = """# What every engine proves

This page is written by the conformance suite, from a run of it:

    pytest tests/conformance --write-table docs/how_it_works/conformance.md

A cell says how many cases of a feature passed on an engine. The cases of one feature differ in how
the batch is cut, in the dtype of the parameters, and in the mode: eager, or compiled by
`tf.function`, `torch.compile` (of the loss) or `jax.jit`. All engines see the same numbers and the
same losses, and each of them must equal gradients that were derived by hand, in float64, to 1e-12.
"""


def features() -> list[str]:
    """The rows of the table, in order."""
    return list(dict.fromkeys(case.feature for case in CASES))


def rows(passed: Mapping[str, Iterable[str]], engines: Sequence[str]) -> dict[str, list[str]]:
    """The cells of each feature for some engines.

    Args:
        passed: engine -> feature of each case that passed.
        engines: the columns.
    """
    counts = {engine: Counter(passed.get(engine, ())) for engine in engines}
    return {
        feature: [_cell(feature, engine, counts[engine][feature]) for engine in engines]
        for feature in features()
    }


def _cell(feature: str, engine: str, count: int) -> str:
    reasons: dict[str, list[str]] = {}
    for (name, of_engine, mode), reason in DOES_NOT_APPLY.items():
        if (name, of_engine) == (feature, engine):
            reasons.setdefault(reason, []).append(mode)
    left_out = [
        f"{' and '.join(modes)} does not apply: {reason}" for reason, modes in reasons.items()
    ]
    return "; ".join(([f"yes ({count})"] if count else [] if left_out else ["no"]) + left_out)


def page(passed: Mapping[str, Iterable[str]]) -> str:
    """The whole page.

    Args:
        passed: engine -> feature of each case that passed.
    """
    lines = [
        "| feature | " + " | ".join(TITLES[engine] for engine in ENGINES) + " |",
        "|---|" + "---|" * len(ENGINES),
    ]
    for feature, cells in rows(passed, ENGINES).items():
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    return HEADING + "\n" + "\n".join(lines) + "\n"


def differences(text: str, passed: Mapping[str, Iterable[str]], engines: Sequence[str]) -> list:
    """What a page says otherwise than a run of some engines.

    Args:
        text: the page as it is checked in.
        passed: engine -> feature of each case that passed.
        engines: the engines of the run.

    Returns:
        One line for each cell or row that differs.
    """
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    header, *table = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    names = {title: engine for engine, title in TITLES.items()}
    columns = [names[title] for title in header[1:]]
    written = {cells[0]: dict(zip(columns, cells[1:], strict=True)) for cells in table}
    found = rows(passed, engines)
    result = [f"{feature!r} is not a feature" for feature in written if feature not in found]
    for feature, cells in found.items():
        for engine, cell in zip(engines, cells, strict=True):
            stated = written.get(feature, {}).get(engine)
            if stated != cell:
                result.append(f"{feature!r} on {engine}: the run gives {cell!r}, not {stated!r}")
    if not result and set(engines) == set(ENGINES) and text != page(passed):
        result.append("the text around the table differs")
    return result
