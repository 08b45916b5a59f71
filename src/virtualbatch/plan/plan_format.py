"""Plans as text. Everything is checked when the text is read."""

import json
import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from virtualbatch.plan.plan import Plan, PlanRow
from virtualbatch.plan.signature import Leaf, Signature

Entry = tuple[Signature, Plan]

_FORMAT = "virtualbatch plans"
# The first version was a bare list.
_VERSION = 2
# Fields of the first version, which had no loss and no limit. Its plans are ignored and made anew.
_TOO_OLD = {"program", "rows", "leaves"}


def as_text(entries: Iterable[Entry]) -> str:
    """Plans as the text of a file.

    Args:
        entries: pairs of a signature and its plan.
    """
    # Each plan has its own line, so that a person can read and compare them.
    plans = ",\n ".join(
        json.dumps({"signature": signature._asdict(), "plan": asdict(plan)}, allow_nan=False)
        for signature, plan in entries
    )
    return f'{{"format": "{_FORMAT}", "version": {_VERSION}, "plans": [\n {plans}\n]}}\n'


def entries_in(content: bytes) -> list[Entry]:
    """The plans in a file.

    Args:
        content: the content of the file. An empty file holds no plans.

    Raises:
        ValueError: the file holds something else. The text completes "Got a file in which".
    """
    text = _decoded(content)
    if not text.strip():
        return []
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is not JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("lists are nested too deep") from error
    plans = found if isinstance(found, list) and found else _plans_in(found)
    entries = []
    for number, entry in enumerate(plans):
        where = f"plan {number}"
        _fields(entry, where, {"signature", "plan"})
        signature = entry["signature"]
        if found is plans and isinstance(signature, dict) and set(signature) == _TOO_OLD:
            continue
        entries.append((_signature(signature, where), _plan(entry["plan"], where)))
    return entries


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from error


def _plans_in(found: Any) -> list[Any]:
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f'there is no format="{_FORMAT}"')
    version = found.get("version")
    if version != _VERSION or isinstance(version, bool):
        raise ValueError(
            f"the version is {_short(version)}, and this release reads version {_VERSION}"
        )
    _fields(found, "the file", {"format", "version", "plans"})
    plans: list[Any] = _list(found["plans"], "plans")
    return plans


def _signature(found: Any, where: str) -> Signature:
    _fields(found, f"the signature of {where}", set(Signature._fields))
    return Signature(
        _text(found["program"], f"program of {where}"),
        _text(found["loss"], f"loss of {where}"),
        _whole(found["rows"], f"rows of {where}", 1),
        tuple(_leaf(leaf, where) for leaf in _list(found["leaves"], f"leaves of {where}")),
        _text(found["limit"], f"limit of {where}"),
    )


def _leaf(found: Any, where: str) -> Leaf:
    if not isinstance(found, list) or len(found) != len(Leaf._fields):
        raise ValueError(f"a leaf of {where} is {_short(found)}")
    place, shape, dtype = found
    return Leaf(
        _text(place, f"a leaf of {where}"),
        tuple(
            _whole(size, f"a shape of {where}", 0) for size in _list(shape, f"a shape of {where}")
        ),
        _text(dtype, f"a dtype of {where}"),
    )


def _plan(found: Any, where: str) -> Plan:
    _fields(found, where, set(Plan.__dataclass_fields__))
    return Plan(
        _whole(found["microbatch_size"], f"microbatch_size of {where}", 1),
        _whole(found["accumulation_steps"], f"accumulation_steps of {where}", 1),
        _whole(found["memory_limit"], f"memory_limit of {where}", 1),
        _shown(found["reason"], f"reason of {where}"),
        tuple(_row(row, where) for row in _list(found["rows"], f"rows of {where}")),
    )


def _row(found: Any, where: str) -> PlanRow:
    _fields(found, f"a row of {where}", set(PlanRow.__dataclass_fields__))
    if not isinstance(found["measured"], bool):
        raise ValueError(f"measured of {where} is {_short(found['measured'])}")
    return PlanRow(
        _whole(found["microbatch_size"], f"microbatch_size of a row of {where}", 1),
        _or_none(_whole, found["peak_bytes"], f"peak_bytes of {where}", 0),
        found["measured"],
        _or_none(_seconds, found["seconds_per_batch"], f"seconds_per_batch of {where}"),
    )


def _fields(found: Any, where: str, names: set[str]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is {_short(found)}")
    if set(found) != names:
        other = sorted(names ^ set(found))[0]
        raise ValueError(f"{where} {'has' if other in found else 'lacks'} {_short(other)}")


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise ValueError(f"{where} is {_short(found)}")
    return found


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise ValueError(f"{where} is {_short(found)}")
    return found


def _shown(found: Any, where: str) -> str:
    # A log line shows this text, and control characters would break the line.
    if not _text(found, where).isprintable():
        raise ValueError(f"{where} is {_short(found)}")
    return str(found)


def _whole(found: Any, where: str, least: int) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{where} is {_short(found)}")
    return found


def _seconds(found: Any, where: str) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{where} is {_short(found)}")
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"{where} is {_short(found)}")
    return float(found)


def _or_none(read: Callable[..., Any], found: Any, *more: Any) -> Any:
    return None if found is None else read(found, *more)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_short(twice)} occurs twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} occurs, which is not a number")


def _short(found: Any) -> str:
    return reprlib.repr(found)
