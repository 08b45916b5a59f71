"""What became of a call, in words, and which of them are faults of the library."""

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tests.fuzz.call import Call, NoOracle, Result, UsersError

import virtualbatch

RIGHT = "right"
CLEAR = "clear"
USERS = "user's"
FRAMEWORK = "framework's"
UNTRIED = "untried"
OBSCURE = "obscure"
WRONG = "wrong"
CHANGED = "changed"
KINDS = (RIGHT, CLEAR, USERS, FRAMEWORK, UNTRIED, OBSCURE, WRONG, CHANGED)
FAULTS = (OBSCURE, WRONG, CHANGED)

LIBRARY = str(Path(virtualbatch.__file__).parent)
HERE = Path(__file__).parent
# Files whose frames stand for the user's own functions.
USERS_FILES = {str(HERE / name) for name in ("losses.py", "batches.py", "functions.py")} | {
    str(HERE / f"{framework}_losses.py") for framework in ("torch", "tensorflow", "jax", "keras")
}
RUNNERS = {str(HERE / "cases.py")}

_THREE_PARTS = re.compile(r"^.+?[.:] .*\bGot .+?[.:] .+", re.DOTALL)
_TAKES = re.compile(
    r"^(_two_arguments\.<locals>|Pair\.|nothing\().*(required positional|unexpected keyword)"
)
# What Python and frameworks raise of themselves is seldom a refusal.
_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)


class Outcome(NamedTuple):
    """What became of a call.

    Fields:
        kind: one of `KINDS`.
        where: what equal findings share: the line that raised.
        text: more of it.
    """

    kind: str
    where: str = ""
    text: str = ""


def of_error(error: BaseException, uncut: BaseException | None) -> Outcome:
    """Classifies an error of a call.

    Args:
        error: what the call raised.
        uncut: what the framework alone raised for the same input; None if it raised nothing.
    """
    if str(error).startswith("in user code:") and error.__context__ is not None:
        # AutoGraph makes errors anew. Behind its own is what the user's line raised.
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {str(error)[:300]}"
    of_library = [k for k, frame in enumerate(frames) if frame.filename.startswith(LIBRARY)]
    # A model of Keras is the user's function, too.
    of_user = [
        k
        for k, frame in enumerate(frames)
        if frame.filename in USERS_FILES or "/keras/src/" in frame.filename
    ]
    last = of_library[-1] if of_library else -1
    place = frames[last] if of_library else frames[-1]
    where = f"{place.filename.removeprefix(LIBRARY + '/')}:{place.lineno}"
    # Raised by the user's own function, or by Python for what it takes.
    by_user = frames[-1].filename in USERS_FILES and (frames[-1].line or "").startswith("raise")
    takes = isinstance(error, TypeError) and _TAKES.match(str(error))
    if isinstance(error, UsersError) or by_user or takes:
        return Outcome(USERS, where, text)
    if isinstance(error, OSError) and error.errno and error.filename:
        # The system's own words, about a file that is named.
        return Outcome(CLEAR, where, text)
    is_raised_here = last == len(frames) - 1
    if is_raised_here and is_clear(error):
        return Outcome(CLEAR, where, text)
    in_users_line = bool(of_user) and of_user[-1] > last
    # In its own line the user's function may fail in other ways where it is traced.
    as_uncut = in_users_line or (_same(error, uncut) and _words(error) == _words(uncut))
    # `tf.function` says it of what it does not take, such as a deque, and names that.
    untraced = str(error).startswith("Could not generate a generic TraceType for")
    if untraced or (uncut is not None and as_uncut):
        return Outcome(FRAMEWORK, where, text)
    if not of_library and not of_user:
        # The framework refused before it came to the library.
        return Outcome(FRAMEWORK, where, text)
    if in_users_line:
        return Outcome(OBSCURE, where, f"raised in the user's line, and not uncut: {text}")
    return Outcome(OBSCURE, where, text)


def is_clear(error: BaseException) -> bool:
    """Whether an error says what holds, what it got, and what to do."""
    text = str(error)
    return (
        isinstance(error, _REFUSALS)
        and "internal" not in text
        and _THREE_PARTS.match(text) is not None
    )


def _same(error: BaseException, uncut: BaseException | None) -> bool:
    if uncut is None:
        return False
    return isinstance(error, type(uncut)) or isinstance(uncut, type(error))


def _words(error: BaseException | None) -> str:
    """What an error says, whatever numbers and names of local functions are in it."""
    text = str(error)
    if text.startswith("in user code:"):
        # TensorFlow writes a stack before it.
        text = text.strip().rpartition("\n")[2].strip().partition(": ")[2]
    # Where an operation stands in a graph is no part of it, either.
    text = re.sub(r"\s*(\{\{.*?\}\}|\[\[.*?\]\]|\[Op:.*)\s*", "", text)
    return re.sub(r"\S*<locals>\.[\w<>]+|\d+", "", text)


def of_result(call: Call, result: Result | None, uncut: Result | BaseException) -> Outcome:
    """Classifies what a call returned.

    Args:
        call: the call.
        result: what it gave; None if there is nothing to compare.
        uncut: what the framework alone gave for the same input, or raised.
    """
    if result is None or not call.is_judged or isinstance(uncut, NoOracle):
        return Outcome(RIGHT)
    if isinstance(uncut, BaseException):
        return Outcome(
            WRONG, "accepted", f"uncut it raises {type(uncut).__name__}: {str(uncut)[:200]}"
        )
    if call.is_empty:
        told = different(result, uncut, aux=False, missing=None)
    else:
        told = different(result, uncut, call.aux_is_judged)
    return Outcome(WRONG, "differs", told) if told else Outcome(RIGHT)


def different(result: Result, uncut: Result, aux: bool, missing: Any = "missing") -> str:
    """How two results differ; empty if they do not, to rounding.

    Args:
        result: what a call gave.
        uncut: what is due.
        aux: whether leaves of aux are compared.
        missing: what stands for a gradient that only one of them has.
    """
    pairs = [("loss", result.loss, uncut.loss)]
    count = max(len(result.gradients), len(uncut.gradients))
    for k in range(count):
        both = [
            found.gradients[k] if k < len(found.gradients) else missing for found in (result, uncut)
        ]
        pairs.append((f"gradient {k}", *both))
    if aux:
        if len(result.aux) != len(uncut.aux):
            return f"{len(result.aux)} leaves of aux for {len(uncut.aux)}"
        pairs += [
            (f"aux {k}", *both) for k, both in enumerate(zip(result.aux, uncut.aux, strict=True))
        ]
    width = _width([loss for _, *both in pairs[:1] for loss in both])
    for name, found, due in pairs:
        if not _alike(found, due, width):
            return f"{name} is {_short(found)} and uncut {_short(due)}"
    return ""


def _width(losses: list[Any]) -> float:
    """The rounding of the coarsest dtype that a loss has."""
    dtypes = [np.asarray(loss).dtype for loss in losses]
    # bfloat16 and its like are no floats of NumPy.
    return max(np.finfo(d).eps if d.kind == "f" else 2.0**-7 for d in dtypes)


def _alike(found: Any, due: Any, width: float) -> bool:
    if found is None or due is None:
        # A gradient of zero and none at all train alike.
        other = due if found is None else found
        return other is None or (not isinstance(other, str) and not np.any(np.asarray(other)))
    if isinstance(found, str) or isinstance(due, str):
        return type(found) is type(due) and found == due
    a, b = np.asarray(found), np.asarray(due)
    if "O" in (a.dtype.kind, b.dtype.kind):
        # Such as a generator, which only a call that is not cut hands on.
        return type(found) is type(due)
    if a.dtype.kind not in "fiucb" or b.dtype.kind not in "fiucb":
        a, b = (np.asarray(x, dtype=float) for x in (a, b))
    if a.shape != b.shape:
        return False
    own = max([width, *(np.finfo(x.dtype).eps for x in (a, b) if x.dtype.kind == "f")])
    # A sum of six rows and its cancellations; losses here are of the order of 1.
    with np.errstate(all="ignore"):
        size = np.max(np.abs(b[np.isfinite(b)]), initial=1.0)
    return bool(np.allclose(a, b, rtol=0, atol=64 * own * size, equal_nan=True))


def _short(value: Any) -> str:
    return np.array2string(np.asarray(value), threshold=6, precision=6)[:80].replace("\n", " ")


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What of a state is another after an error; empty if nothing is."""
    for name in before.keys() | after.keys():
        a, b = before.get(name, "missing"), after.get(name, "missing")
        if a is None or b is None or isinstance(a, str | bool) or isinstance(b, str | bool):
            if a is not b and (type(a) is not type(b) or a != b):
                return f"{name} was {a} and is {b}"
        elif not np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True):
            return f"{name} was {_short(a)} and is {_short(b)}"
    return ""
