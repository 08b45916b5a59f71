"""The verbs that know no framework."""

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tests.fuzz import batches, options
from tests.fuzz.batches import ROWS
from tests.fuzz.call import Call, Fault, Result
from tests.fuzz.losses import plain_loop

import virtualbatch
from virtualbatch.report import write_html

ALLOWED = {
    "Window": frozenset(),
    "windows": frozenset({"accumulation_steps"}),
    "pack": frozenset({"lengths", "microbatch_tokens", "round_to", "padded"}),
    "whole_groups": frozenset({"groups", "microbatch_size"}),
    "NoiseScale": frozenset({"decay", "confidence", "stats", "plan", "seconds_per_row",
                             "seconds_per_update", "rows"}),
    "write_html": frozenset({"file", "result"}),
    "certify_loop": frozenset({"microbatch_size", "batches", "save", "load", "loop"}),
    "Auto": frozenset({"memory_limit", "file", "grow_after"}),
}  # fmt: skip

STATS = [virtualbatch.WindowStats(64, 4, 3.0 + k / 10, 1.0) for k in range(4)]


class Ops:
    """NumPy."""

    def array(self, values: Any) -> Any:
        return np.asarray(values)

    def cast(self, value: Any, dtype: str) -> Any:
        return value.astype(dtype)


class Neutral:
    """Verbs for any framework."""

    name = "neutral"
    verbs = tuple(ALLOWED)

    def __init__(self) -> None:
        self.faults = [*batches.FAULTS, *options.FAULTS, *own_faults()]
        self.faults = [fault for fault in self.faults if fault.part != "trained"]

    def call(self, verb: str, random: Random) -> Call:
        x, y = batches.arrays(Ops())
        ids = np.arange(24).reshape(ROWS, 4)
        batch: Any = {"x": ids, "y": y} if verb == "pack" else {"x": x, "y": y}
        given = {
            "windows": {"accumulation_steps": 2},
            "pack": {"lengths": [1, 4, 2, 3, 2, 1], "microbatch_tokens": 8},
            "whole_groups": {"groups": [0, 1, 0, 2, 1, 2], "microbatch_size": 3},
            "certify_loop": {"microbatch_size": 2},
        }.get(verb, {})
        if verb in ("NoiseScale", "write_html", "Auto"):
            batch = None
        call = Call(verb, Ops(), batch, None, None, given, ALLOWED[verb])
        if verb == "certify_loop":
            call.weights = np.array([1.0, 2.0, 3.0])
        return call

    def uncut(self, call: Call) -> Result:
        """No row is lost; and what a loop does on a whole batch."""
        if call.verb == "certify_loop":
            loop, save, load = plain_loop(call.weights)
            call.options.get("load", load)(call.options.get("save", save)())
            loop([call.batch], 1)
        return Result(np.float64(0), [], [])

    def run(self, call: Call) -> Result | None:
        given = dict(call.options)
        match call.verb:
            case "Window":
                list(virtualbatch.Window(call.batch))
            case "windows":
                list(virtualbatch.windows(call.batch, **given))
            case "pack":
                return _rows(call, virtualbatch.pack(call.batch, **given))
            case "whole_groups":
                return _rows(call, virtualbatch.whole_groups(call.batch, **given))
            case "NoiseScale":
                _noise(given)
            case "write_html":
                with tempfile.TemporaryDirectory() as folder:
                    file = given.get("file", Path(folder) / "page.html")
                    write_html(file, given.get("result", 3))
            case "Auto":
                virtualbatch.Auto(**given)
            case _:
                _loop(call, given)
        return None

    def state(self, call: Call) -> dict[str, Any]:
        return {"weights": None if call.weights is None else call.weights.copy()}


def _rows(call: Call, window: Any) -> Result | None:
    """Whether each row of the first array is there once, by its first entry."""
    if type(call.batch) is not dict or "y" not in call.batch:
        return None
    rows = sorted(float(v) for piece in window for v in np.asarray(piece["y"]).reshape(-1))
    due = sorted(float(v) for v in np.asarray(call.batch["y"]).reshape(-1))
    return Result(np.float64(rows != due), [], [])


def _noise(given: dict[str, Any]) -> None:
    scale = virtualbatch.NoiseScale(**({"decay": given["decay"]} if "decay" in given else {}))
    for stats in [*STATS, *([given["stats"]] if "stats" in given else [])]:
        scale.update(stats)
    confidence = {"confidence": given["confidence"]} if "confidence" in given else {}
    scale.estimate(**confidence)
    names = ("seconds_per_row", "seconds_per_update", "rows", "plan")
    costs = {"seconds_per_row": 1e-3, "seconds_per_update": 1e-2}
    scale.advice(**costs | {name: given[name] for name in names if name in given}, **confidence)


def _loop(call: Call, given: dict[str, Any]) -> None:
    loop, save, load = plain_loop(call.weights)
    given = {"loop": loop, "batches": [call.batch, call.batch], "save": save, "load": load} | given
    # Who saves or loads nothing has a state that nobody can put back.
    call.keeps_state = not call.options.keys() & {"save", "load", "loop"}
    virtualbatch.certify_loop(given.pop("loop"), given.pop("batches"), **given)


LENGTHS: dict[str, Any] = {
    **options.WORDS,
    "too few": [1, 2],
    "floats": [1.0] * ROWS,
    "zero": [0] * ROWS,
    "negative": [-1] * ROWS,
    "too long": [9] * ROWS,
    "huge": [10**30] * ROWS,
    "texts": ["a"] * ROWS,
    "mixed": [1, "a", None, 2, 3, 4],
    "of Nones": [None] * ROWS,
    "ragged": [[1], [1, 2], [1], [1], [1], [1]],
    "a column": np.ones((ROWS, 1), int),
    "bools": [True] * ROWS,
    "unsigned": np.array([1, 2, 3, 4, 1, 2], np.uint8),
    "NaN inside": [1.0, float("nan"), 1, 1, 1, 1],
    "a generator": (k for k in [1] * ROWS),
    "objects": [object() for _ in range(ROWS)],
    "a dict by row": dict.fromkeys(range(ROWS), 1),
    "a set": {1, 2, 3, 4, 5, 6},
    "dicts": [{}] * ROWS,
}

PADDED: dict[str, Any] = {
    **options.WORDS,
    "right": {"x": True, "y": False},
    "all": {"x": True, "y": True},
    "none of them": {"x": False, "y": False},
    "numbers": {"x": 1, "y": 0},
    "texts": {"x": "yes", "y": "no"},
    "another structure": [True, False],
    "fewer": {"x": True},
    "arrays": {"x": np.array([True]), "y": np.array([False])},
    "Nones": {"x": None, "y": None},
}

FILES: dict[str, Any] = {
    "a folder": ".",
    "nowhere": "/no/such/folder/file.json",
    "empty": "",
    "a number": 3.5,
    "None": None,
    "an object": object(),
    "a list": ["a"],
    "bytes": b"name",
    "a null byte": "a\0b",
    "too long": "a" * 5000,
}


def own_faults() -> list[Fault]:
    """What only these verbs are given."""
    stats = virtualbatch.WindowStats
    numbers = {
        "too few": (1, 2), "texts": stats("a", "b", "c", "d"), "NaN": stats(64, 4, float("nan"), 1),
        "Nones": stats(None, None, None, None), "zero": stats(0, 0, 0, 0), "negative": stats(
            -64, -4, -3.0, -1.0), "right": STATS[0], "arrays": stats(*[np.ones(2)] * 4),
        "complex": stats(1j, 1j, 1j, 1j), "five": (1, 2, 3, 4, 5), "huge": stats(10**400, 4, 1, 1),
        "no rows": stats(0, 4, 3.0, 1.0),
    }  # fmt: skip
    words = options.WORDS
    functions = {
        **words,
        "raises nothing": lambda *args: None,
        "a number": lambda *args: 3,
        "text": lambda *args: "text",
        "a dict of text": lambda *args: {"a": "text"},
        "an object array": lambda *args: np.array([None, 1], dtype=object),
    }
    option = options.option
    return [
        *option("lengths", LENGTHS),
        *option("groups", LENGTHS),
        *option("padded", PADDED),
        *option("microbatch_tokens", options.SIZES),
        *option("round_to", options.SIZES),
        *(f for part in ("decay", "confidence", "seconds_per_row", "seconds_per_update", "rows")
          for f in option(part, {**words, "infinity": float("inf"), "0.5": 0.5, "1j": 1j})),
        *option("plan", words),
        *option("stats", {**words, **numbers}),
        *option("file", FILES),
        *option("result", {**words, "pairs": [(1, 2)], "nothing": [], "a pair": (1, 2)}),
        *option("grow_after", options.SIZES),
        *option("batches", {**words, "none": [], "one": [np.ones((6, 3))], "other rows": [
            np.ones((6, 3)), np.ones((5, 3))], "texts": ["ab", "cd"], "numbers": [1, 2],
            "Nones": [None, None], "other structures": [{"x": np.ones((6, 3))}, [np.ones((6, 3))]],
            "lists": [[1, 2, 3, 4, 5, 6]] * 2}),
        *option("save", functions),
        *option("load", functions),
        *option("loop", functions),
    ]  # fmt: skip
