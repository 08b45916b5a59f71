"""What is wrong with a user's function. Frames of this file are the user's."""

import decimal
import fractions
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from tests.fuzz.call import ROWS, Call, Fault, UsersError
from tests.fuzz.losses import found


def _raises(error: BaseException) -> Any:
    raise error


def _first(batch: Any) -> Any:
    return next(iter(found(batch)))


def _count(leaf: Any) -> int:
    # A trace knows its shape, and not its length.
    return leaf.shape[0] if hasattr(leaf, "shape") else len(leaf)


def _mutated(batch: Any) -> Any:
    if isinstance(batch, dict):
        batch["new"] = 1
    if isinstance(batch, list):
        batch.append(1)
    return None


def _emptied(batch: Any) -> Any:
    if isinstance(batch, dict | list):
        batch.clear()
    return None


def _beside(value: Any) -> Callable[..., Any]:
    """The loss with something beside it, if there is not already."""
    return lambda loss, batch, ops, count: (value(loss, batch, ops), loss)[1]


# (loss, micro-batch, ops, number of this call) -> what the loss function returns instead.
LOSSES: dict[str, Any] = {
    "None": lambda loss, batch, ops, k: None,
    "the loss in a tuple": lambda loss, batch, ops, k: (loss,),
    "a tuple": lambda loss, batch, ops, k: (loss, None),
    "three things": lambda loss, batch, ops, k: (loss, loss, loss),
    "a list": lambda loss, batch, ops, k: [loss],
    "a vector": lambda loss, batch, ops, k: loss * ops.rows(_first(batch)),
    "one number in a vector": lambda loss, batch, ops, k: loss[None],
    "an int": lambda loss, batch, ops, k: 3,
    "a float": lambda loss, batch, ops, k: 3.0,
    "a NumPy number": lambda loss, batch, ops, k: np.float64(3),
    "a bool": lambda loss, batch, ops, k: True,
    "text": lambda loss, batch, ops, k: "loss",
    "an object": lambda loss, batch, ops, k: object(),
    "a function": lambda loss, batch, ops, k: lambda: loss,
    "a generator": lambda loss, batch, ops, k: (x for x in [loss]),
    "the batch": lambda loss, batch, ops, k: batch,
    "no terms": lambda loss, batch, ops, k: {},
    "terms by number": lambda loss, batch, ops, k: {1: loss, 2: loss},
    "terms by mixed names": lambda loss, batch, ops, k: {"a": loss, 2: loss},
    "a term by None": lambda loss, batch, ops, k: {None: loss},
    "a term None": lambda loss, batch, ops, k: {"a": None},
    "a term of text": lambda loss, batch, ops, k: {"a": "text", "b": loss},
    "a term of a float": lambda loss, batch, ops, k: {"a": 1.0, "b": loss},
    "terms in a term": lambda loss, batch, ops, k: {"a": {"b": loss}},
    "a vector as a term": lambda loss, batch, ops, k: {"a": loss * ops.rows(_first(batch))},
    "complex": lambda loss, batch, ops, k: ops.cast(loss, "complex64"),
    "integers": lambda loss, batch, ops, k: ops.cast(loss, "int32"),
    "half": lambda loss, batch, ops, k: ops.cast(loss, "float16"),
    "single": lambda loss, batch, ops, k: ops.cast(loss, "float32"),
    "a constant": lambda loss, batch, ops, k: ops.array(np.float64(2)),
    "NaN": lambda loss, batch, ops, k: loss * float("nan"),
    "NaN at first": lambda loss, batch, ops, k: loss * (float("nan") if k == 0 else 1.0),
    "a sum": lambda loss, batch, ops, k: loss * _count(_first(batch)),
    "the largest": lambda loss, batch, ops, k: loss * ops.largest(_first(batch)),
    "raises": lambda loss, batch, ops, k: _raises(UsersError("mine")),
    "raises late": lambda loss, batch, ops, k: _raises(UsersError("late")) if k else loss,
    "raises KeyError": lambda loss, batch, ops, k: _raises(KeyError("mine")),
    "raises StopIteration": lambda loss, batch, ops, k: _raises(StopIteration("mine")),
    "raises RuntimeError": lambda loss, batch, ops, k: _raises(RuntimeError("mine")),
    "raises AssertionError": lambda loss, batch, ops, k: _raises(AssertionError()),
    "raises RecursionError": lambda loss, batch, ops, k: _raises(RecursionError("mine")),
    "changes the batch": _beside(lambda loss, batch, ops: _mutated(batch)),
    "empties the batch": _beside(lambda loss, batch, ops: _emptied(batch)),
    "terms at first": lambda loss, batch, ops, k: loss if k else {"a": loss},
    "terms later": lambda loss, batch, ops, k: {"a": loss} if k else loss,
    "other terms later": lambda loss, batch, ops, k: {"b" if k else "a": loss},
    "more terms later": lambda loss, batch, ops, k: {str(n): loss for n in range(k + 1)},
    "None later": lambda loss, batch, ops, k: None if k else loss,
    "a tuple later": lambda loss, batch, ops, k: (loss, loss) if k else loss,
    "dtypes that change": lambda loss, batch, ops, k: ops.cast(loss, "float32") if k else loss,
}

# micro-batch, ops, number of this call -> weight.
WEIGHTS: dict[str, Any] = {
    "None": lambda batch, ops, k: None,
    "text": lambda batch, ops, k: "sum of rows",
    "the word sum": lambda batch, ops, k: "sum",
    "rows": lambda batch, ops, k: len(_first(batch)),
    "a list": lambda batch, ops, k: [1, 2],
    "an empty list": lambda batch, ops, k: [],
    "an empty dict": lambda batch, ops, k: {},
    "other names": lambda batch, ops, k: {"wrong": 1.0},
    "right names": lambda batch, ops, k: {"first": len(_first(batch)), "second": "sum"},
    "names None": lambda batch, ops, k: {"first": None, "second": None},
    "a negative number": lambda batch, ops, k: -1.0,
    "negative once": lambda batch, ops, k: -1.0 if k == 0 else 2.0,
    "NaN": lambda batch, ops, k: float("nan"),
    "infinity": lambda batch, ops, k: float("inf"),
    "zero": lambda batch, ops, k: 0,
    "one": lambda batch, ops, k: 1.0,
    "beyond float32": lambda batch, ops, k: 1e39,
    "beyond float64": lambda batch, ops, k: 10**400,
    "complex": lambda batch, ops, k: 1j,
    "True": lambda batch, ops, k: True,
    "a vector": lambda batch, ops, k: ops.rows(_first(batch)),
    "a generator": lambda batch, ops, k: (x for x in [1.0]),
    "an object": lambda batch, ops, k: object(),
    "a Decimal": lambda batch, ops, k: decimal.Decimal(2),
    "a Fraction": lambda batch, ops, k: fractions.Fraction(1, 3),
    "a NumPy number": lambda batch, ops, k: np.float32(2),
    "a NumPy vector": lambda batch, ops, k: np.ones(2),
    "a NumPy text": lambda batch, ops, k: np.str_("a"),
    "the batch": lambda batch, ops, k: batch,
    "a function": lambda batch, ops, k: len,
    "raises": lambda batch, ops, k: _raises(UsersError("weight")),
    "raises late": lambda batch, ops, k: _raises(UsersError("weight")) if k else 1.0,
    "raises IndexError": lambda batch, ops, k: _raises(IndexError("weight")),
    "changes the batch": lambda batch, ops, k: _mutated(batch) or 1.0,
    "names that change": lambda batch, ops, k: {"first": 1.0, "second": 1.0} if k else 1.0,
    "a dict of text": lambda batch, ops, k: {"first": "a", "second": 1.0},
}

# Not functions at all.
NO_FUNCTIONS: dict[str, Any] = {
    "text": "mean",
    "the word sum": "sum",
    "a number": 3,
    "a list": [1.0, 2.0],
    "a dict": {"loss": 1.0},
    "NaN": float("nan"),
    "an array": np.ones(2),
    "False": False,
}

# loss, micro-batch, ops, number of this call -> aux.
AUXES: dict[str, Any] = {
    "None": lambda loss, batch, ops, k: None,
    "text": lambda loss, batch, ops, k: "aux",
    "texts": lambda loss, batch, ops, k: ["a", "b"],
    "an object": lambda loss, batch, ops, k: {"a": object()},
    "a bool": lambda loss, batch, ops, k: {"a": True},
    "an int": lambda loss, batch, ops, k: {"a": 3},
    "a float": lambda loss, batch, ops, k: {"a": 3.5},
    "complex": lambda loss, batch, ops, k: {"a": 1j},
    "a generator": lambda loss, batch, ops, k: (x for x in [loss]),
    "a set": lambda loss, batch, ops, k: {1, 2},
    "a function": lambda loss, batch, ops, k: len,
    "by number": lambda loss, batch, ops, k: {1: loss, 0: loss},
    "mixed names": lambda loss, batch, ops, k: {"a": loss, 1: loss},
    "names that change": lambda loss, batch, ops, k: {str(k): loss},
    "None later": lambda loss, batch, ops, k: None if k else loss,
    "text later": lambda loss, batch, ops, k: "text" if k else loss,
    "more later": lambda loss, batch, ops, k: [loss] * (k + 1),
    "shapes that change": lambda loss, batch, ops, k: ops.array(np.ones(k + 2)),
    "axes that change": lambda loss, batch, ops, k: ops.array(np.ones((2,) * (k + 1))),
    "a NumPy array": lambda loss, batch, ops, k: np.ones(ROWS),
    "an object array": lambda loss, batch, ops, k: np.array([None, 1], dtype=object),
    "the batch": lambda loss, batch, ops, k: batch,
    "an array of bools": lambda loss, batch, ops, k: ops.array(np.ones(3, bool)),
    "bytes": lambda loss, batch, ops, k: ops.array(np.full((), 200, np.uint8)),
    "nested": lambda loss, batch, ops, k: [[[[[[loss]]]]], ({"a": [loss]},)],
}


def _loss(name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        before, count = call.loss, itertools.count()
        returned = LOSSES[name]

        def loss(*args: Any) -> Any:
            result = before(*args) if callable(before) else before
            aux: tuple[Any, ...] = ()
            if call.options.get("has_aux") and type(result) is tuple:
                result, *rest = result
                aux = tuple(rest)
            if isinstance(result, dict) and result:
                result = sum(result.values())
            result = returned(result, args[-1], call.ops, next(count))
            return (result, *aux) if aux else result

        call.loss = loss
        # What counts its calls is no function of its batch.
        is_counted = any(word in name for word in ("first", "later", "late", "change", "empties"))
        call.is_judged = call.is_judged and not is_counted
        call.aux_is_judged = call.aux_is_judged and name not in ("a sum", "the largest")

    return Fault(f"loss: {name}", "loss", change)


def _aux(name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        before, count = call.loss, itertools.count()

        def loss(*args: Any) -> Any:
            result = before(*args)
            result = result[0] if type(result) is tuple else result
            return result, AUXES[name](result, args[-1], call.ops, next(count))

        call.loss = loss
        call.options["has_aux"] = True
        call.aux_is_judged = False

    return Fault(f"aux: {name}", "has_aux", change)


def _weight(name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        count = itertools.count()
        call.is_empty = name == "zero"
        # A float32 holds it as infinity: in a graph the loss is NaN, and nobody is deceived.
        is_lost = name == "beyond float32" and call.compiled
        call.is_judged = call.is_judged and not is_lost
        call.options["weight"] = lambda batch: WEIGHTS[name](batch, call.ops, next(count))

    return Fault(f"weight: {name}", "weight", change)


def _no_function(part: str, name: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        if part == "loss":
            call.loss = NO_FUNCTIONS[name]
        else:
            call.options[part] = NO_FUNCTIONS[name]

    return Fault(f"{part} that is {name}", part, change)


def _two_arguments(part: str) -> Fault:
    def change(call: Call, random: Random) -> None:
        if part == "loss":
            call.loss = lambda a, b, c, d: a
        else:
            call.options[part] = lambda a, b: 1.0

    return Fault(f"{part} of too many arguments", part, change)


FAULTS = [
    *map(_loss, LOSSES),
    *map(_aux, AUXES),
    *map(_weight, WEIGHTS),
    *(_no_function(part, name) for part in ("loss", "weight") for name in NO_FUNCTIONS),
    *map(_two_arguments, ("loss", "weight")),
]
