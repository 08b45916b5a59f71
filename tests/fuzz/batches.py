"""What is wrong with a batch. Frames of this file are the user's: generators run late."""

import collections
import dataclasses
import enum
import types
from random import Random
from typing import Any

import numpy as np
from tests.fuzz.call import COLUMNS, ROWS, Call, Fault, UsersError

from virtualbatch import Window


@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclasses.dataclass
class Made:
    """A dataclass whose constructor computes a field."""

    x: Any
    y: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.y = self.x


class Checked(dict):
    """A dict that takes no plain arguments."""

    def __init__(self, owner: str, **items: Any):
        super().__init__(items)
        self.owner = owner


class Odd(tuple):
    """A tuple whose constructor takes two arguments."""

    def __new__(cls, x: Any, y: Any) -> "Odd":
        return super().__new__(cls, (x, y))


class Raising(collections.abc.Mapping):
    """A mapping whose entries cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise UsersError(f"no entry {key}")

    def __iter__(self) -> Any:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def nothing(*args: Any) -> None:
    """A function that does nothing."""


class HasShape:
    """Something that says it has a shape, and is no array."""

    shape = (ROWS, COLUMNS)


class Kind(enum.Enum):
    ONE = 1


Named = collections.namedtuple("Named", ["x", "y"])


def _nested(leaf: Any, depth: int) -> Any:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def _itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _generated(x: Any, y: Any) -> Any:
    yield x
    yield y


# Instead of the batch: (x, y, ops, random) -> batch.
WHOLE: dict[str, Any] = {
    "None": lambda x, y, ops, r: None,
    "an empty dict": lambda x, y, ops, r: {},
    "an empty list": lambda x, y, ops, r: [],
    "an empty tuple": lambda x, y, ops, r: (),
    "text": lambda x, y, ops, r: "batch",
    "bytes": lambda x, y, ops, r: b"batch",
    "an int": lambda x, y, ops, r: 3,
    "a float": lambda x, y, ops, r: 3.5,
    "a NumPy scalar": lambda x, y, ops, r: np.float64(3),
    "a scalar array": lambda x, y, ops, r: ops.array(np.float64(3)),
    "an object": lambda x, y, ops, r: object(),
    "a class": lambda x, y, ops, r: dict,
    "a function": lambda x, y, ops, r: _nested,
    "an error": lambda x, y, ops, r: ValueError("batch"),
    "an enum": lambda x, y, ops, r: Kind.ONE,
    "a generator": lambda x, y, ops, r: _generated(x, y),
    "a zip": lambda x, y, ops, r: zip([x], [y], strict=True),
    "a range": lambda x, y, ops, r: range(ROWS),
    "a set of numbers": lambda x, y, ops, r: {1, 2, 3},
    "a set of objects": lambda x, y, ops, r: {object(), object()},
    "texts": lambda x, y, ops, r: ["a", "b", "c"],
    "numbers": lambda x, y, ops, r: [1.0] * ROWS,
    "ragged numbers": lambda x, y, ops, r: [[1.0, 2.0], [3.0]],
    "a deque": lambda x, y, ops, r: collections.deque([x, y]),
    "values of a dict": lambda x, y, ops, r: {"x": x, "y": y}.values(),
    "a namespace": lambda x, y, ops, r: types.SimpleNamespace(x=x, y=y),
    "a list that holds itself": lambda x, y, ops, r: _itself(),
    "nested 40 deep": lambda x, y, ops, r: _nested(x, 40),
    "nested 5000 deep": lambda x, y, ops, r: _nested(x, 5000),
    "a named tuple": lambda x, y, ops, r: Named(x, y),
    "a dataclass": lambda x, y, ops, r: Pair(x, y),
    "a frozen dataclass": lambda x, y, ops, r: Frozen(x, y),
    "a dataclass with a constructor": lambda x, y, ops, r: Made(x),
    "a class of dataclasses": lambda x, y, ops, r: Pair,
    "a dict of a class": lambda x, y, ops, r: Checked("me", x=x, y=y),
    "a tuple of a class": lambda x, y, ops, r: Odd(x, y),
    "a mapping that raises": lambda x, y, ops, r: Raising(),
    "an ordered dict": lambda x, y, ops, r: collections.OrderedDict(x=x, y=y),
    "a default dict": lambda x, y, ops, r: collections.defaultdict(list, x=x, y=y),
    "a UserDict": lambda x, y, ops, r: collections.UserDict(x=x, y=y),
    "a proxy": lambda x, y, ops, r: types.MappingProxyType({"x": x, "y": y}),
    "keys of numbers": lambda x, y, ops, r: {1: x, 0: y},
    "mixed keys": lambda x, y, ops, r: {"x": x, 1: y},
    "keys None and tuple": lambda x, y, ops, r: {None: x, (1, 2): y},
    "keys of objects": lambda x, y, ops, r: {object(): x, object(): y},
    "no rows": lambda x, y, ops, r: {"x": x[:0], "y": y[:0]},
    "one row": lambda x, y, ops, r: {"x": x[:1], "y": y[:1]},
    "no columns": lambda x, y, ops, r: {"x": x[:, :0], "y": y},
    "rows that differ": lambda x, y, ops, r: {"x": x, "y": y[:-1]},
    "the same array twice": lambda x, y, ops, r: [x, x],
    "a list of rows": lambda x, y, ops, r: [x[k] for k in range(ROWS)],
    "many leaves": lambda x, y, ops, r: [x] * 50,
    "reversed": lambda x, y, ops, r: {"x": ops.array(np.asarray(x)[::-1].copy()), "y": y},
    "an object array": lambda x, y, ops, r: np.array([{}, "a", None, 1, 2, 3], dtype=object),
    "an array of text": lambda x, y, ops, r: np.array(list("abcdef")),
    "an array of dates": lambda x, y, ops, r: np.arange(ROWS).astype("datetime64[D]"),
    "a structured array": lambda x, y, ops, r: np.zeros(ROWS, dtype=[("a", "f4"), ("b", "i4")]),
    "a masked array": lambda x, y, ops, r: np.ma.masked_less(np.ones((ROWS, COLUMNS)), 0),
    "a matrix": lambda x, y, ops, r: np.matrix(np.ones((ROWS, COLUMNS))),
    "a NumPy array": lambda x, y, ops, r: np.ones((ROWS, COLUMNS)),
    "a read-only array": lambda x, y, ops, r: _read_only(),
    "an array turned": lambda x, y, ops, r: np.ones((COLUMNS, ROWS)).T,
    "an array backwards": lambda x, y, ops, r: np.arange(12.0).reshape(6, 2)[::-1],
    "a half array": lambda x, y, ops, r: ops.array(np.ones((ROWS, 2), np.float16)),
    "an int array": lambda x, y, ops, r: ops.array(np.arange(ROWS)),
    "a bool array": lambda x, y, ops, r: ops.array(np.arange(ROWS) > 2),
    "a byte array": lambda x, y, ops, r: ops.array(np.arange(ROWS, dtype=np.uint8)),
    "a complex array": lambda x, y, ops, r: ops.array(np.ones(ROWS, np.complex64)),
    "NaN in a row": lambda x, y, ops, r: {"x": ops.array(_with(np.nan)), "y": y},
    "infinity in a row": lambda x, y, ops, r: {"x": ops.array(_with(np.inf)), "y": y},
    "an empty Window": lambda x, y, ops, r: Window([]),
    "a Window of nothing": lambda x, y, ops, r: Window([None, None]),
    "a Window in a Window": lambda x, y, ops, r: Window([Window([x]), Window([x])]),
    "a Window in a dict": lambda x, y, ops, r: {"x": Window([x, x]), "y": y},
    "a Window of texts": lambda x, y, ops, r: Window("abc"),
    "a Window of structures": lambda x, y, ops, r: Window([{"x": x}, [x]]),
    "a Window of dtypes": lambda x, y, ops, r: Window([[x], [ops.cast(x, "float32")]]),
    "a Window of shapes": lambda x, y, ops, r: Window([[x], [y]]),
    "a Window without rows": lambda x, y, ops, r: Window([[x], [x[:0]]]),
    "a Window of rows": lambda x, y, ops, r: Window([{"x": x[:4], "y": y[:4]}, {"x": x, "y": y}]),
}

# Beside what is there: (x, ops, random) -> leaf.
LEAVES: dict[str, Any] = {
    "None": lambda x, ops, r: None,
    "a text": lambda x, ops, r: "text",
    "a number": lambda x, ops, r: 2.5,
    "a list of texts, one per row": lambda x, ops, r: ["t"] * ROWS,
    "a list of texts, too few": lambda x, ops, r: ["t"] * 4,
    "a list of numbers, one per row": lambda x, ops, r: [float(k) for k in range(ROWS)],
    "a list of numbers, too few": lambda x, ops, r: [1.0, 2.0],
    "a tuple of objects": lambda x, ops, r: (object(), object()),
    "an object": lambda x, ops, r: object(),
    "a function": lambda x, ops, r: len,
    "a set": lambda x, ops, r: {1, 2},
    "a generator": lambda x, ops, r: _generated(x, x),
    "a scalar array": lambda x, ops, r: ops.array(np.float64(1)),
    "a NumPy scalar": lambda x, ops, r: np.int64(4),
    "a NumPy array": lambda x, ops, r: np.ones(ROWS),
    "an object array": lambda x, ops, r: np.array([None] * ROWS, dtype=object),
    "what has a shape": lambda x, ops, r: HasShape(),
    "an empty list": lambda x, ops, r: [],
    "an empty dict": lambda x, ops, r: {},
    "an array of other rows": lambda x, ops, r: x[:2],
    "ragged lists": lambda x, ops, r: [[1.0] * (k + 1) for k in range(ROWS)],
    "a list with an array": lambda x, ops, r: [1, "a", x],
    "a named tuple": lambda x, ops, r: Named(x, None),
}


def _with(value: float) -> np.ndarray:
    x = np.ones((ROWS, COLUMNS))
    x[1, 1] = value
    return x


def _read_only() -> np.ndarray:
    x = np.arange(12.0).reshape(ROWS, 2)
    x.flags.writeable = False
    return x


def arrays(ops: Any) -> tuple[Any, Any]:
    """The arrays that a batch is made of."""
    values = np.linspace(-1, 2, ROWS * COLUMNS).reshape(ROWS, COLUMNS)
    return ops.array(values), ops.array(np.linspace(0, 1, ROWS))


def _whole(name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        call.batch = WHOLE[name](*arrays(call.ops), call.ops, random)
        # Other verbs cannot do without.
        if isinstance(call.batch, Window) and call.loss is not None and random.random() < 0.8:
            call.options.pop("microbatch_size", None)
            call.options.pop("accumulation_steps", None)

    return Fault(f"batch: {name}", "batch", change)


def _leaf(name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        leaf = LEAVES[name](arrays(call.ops)[0], call.ops, random)
        if type(call.batch) is dict:
            call.batch["odd"] = leaf
        else:
            call.batch = [call.batch, leaf]

    return Fault(f"in the batch: {name}", "batch", change)


FAULTS = [*map(_whole, WHOLE), *map(_leaf, LEAVES)]
