"""Bad input: the same error with the same text in every engine, and nothing has changed."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.conformance.adapters.base import mapped

from virtualbatch.window.window import Window

X = np.ones((6, 2))


class Refusal(NamedTuple):
    """A call that is refused.

    Fields:
        error: type of the error.
        text: regular expression that its text contains; `{loss}` is the engine's name of the
            loss function.
        options: changes to the options of the call.
        batch: batch of NumPy arrays.
        loss: (ops, scalar, batch) -> what the loss function returns, or None for a right one.
        weight: (ops, micro-batch) -> weight.
        reads: whether values are read for it, which a compiled program does not.
        feature: row of the table.
    """

    error: type[Exception]
    text: str
    options: Mapping[str, Any] = MappingProxyType({})
    batch: Any = X
    loss: Callable[..., Any] | None = None
    weight: Callable[..., Any] | None = None
    reads: bool = False
    feature: str = "bad input is refused"


POSITIVE = r'microbatch_size must be a positive integer or "auto"\. Got microbatch_size={}\. Pass '
POSITIVE += r"the number of rows that fit in memory at once\.$"
NO_SIZE = {"microbatch_size": None}
CUT = {**NO_SIZE, "accumulation_steps": None}
WEIGHT = r"A weight must be a finite number, 0 or more\. Got weight={} for micro-batch 0\. Return "
FORM = r"A weight must be one number per micro-batch and term\. Got {} for term '{}'\. Reduce it "
REAL = (
    r"A weight must be a real number\. Got {} for term 'loss'\. Return what the loss was divided by"
)
FUNCTION = r"{} must be a function of one batch\. Got {}=3\. Pass {}=lambda batch: \.\.\.$"
# JAX's function takes parameters too.
LOSS_FUNCTION = r"{loss} must be a function( of one batch)?\. Got {loss}=3\. Pass "

REFUSALS = {
    "size 0": Refusal(ValueError, POSITIVE.format("0"), {"microbatch_size": 0}),
    "negative size": Refusal(ValueError, POSITIVE.format("-4"), {"microbatch_size": -4}),
    "fractional size": Refusal(ValueError, POSITIVE.format(r"2\.5"), {"microbatch_size": 2.5}),
    "boolean size": Refusal(ValueError, POSITIVE.format("True"), {"microbatch_size": True}),
    "text as size": Refusal(ValueError, POSITIVE.format("'big'"), {"microbatch_size": "big"}),
    "no steps": Refusal(
        ValueError,
        r"accumulation_steps must be a positive integer\. Got accumulation_steps=0\. Pass the "
        r"number of micro-batches per update\.$",
        NO_SIZE | {"accumulation_steps": 0},
    ),
    "automatic and counted": Refusal(
        ValueError,
        r'microbatch_size="auto" finds the number of micro-batches itself\. Got '
        r"accumulation_steps=3 with it\. Leave one of them out\.$",
        {"microbatch_size": "auto", "accumulation_steps": 3},
    ),
    "no size": Refusal(
        ValueError,
        r"A batch needs a size to be cut by\. Got neither microbatch_size nor accumulation_steps",
        NO_SIZE,
    ),
    "sizes disagree": Refusal(
        ValueError,
        r"microbatch_size and accumulation_steps must describe the same cut\. Got "
        r"microbatch_size=2 and accumulation_steps=2 for 6 rows / 2 = 3 micro-batches\. Pass only ",
        {"accumulation_steps": 2},
    ),
    "a leaf on the wrong axis": Refusal(
        ValueError,
        r"All arrays of a batch must have the same number of rows\. Got 6 rows in batch\['x'\] "
        r"and 2 rows in batch\['y'\]\[0\]\. Pass arrays that share their leading axis\.$",
        batch={"x": X, "y": [X.T]},
    ),
    "no array": Refusal(
        ValueError,
        r"A batch must hold at least one array\. Got none\. Pass arrays or tensors that share ",
        batch={"x": None},
    ),
    "a scalar leaf": Refusal(
        ValueError,
        r"Every array of a batch must have rows on its first axis\. Got the scalar batch\[1\]\. ",
        batch=[X, np.ones(())],
    ),
    "no rows": Refusal(
        ValueError,
        r"A batch must have at least one row\. Got 0 rows in batch\[0\]\. Skip empty batches ",
        batch=(X[:0], X[:0]),
    ),
    "a size with a Window": Refusal(
        ValueError,
        r"A Window is already cut\. Got microbatch_size=2 and accumulation_steps=None with a "
        r"Window\. Leave both out\.$",
        batch=Window([X]),
    ),
    "an empty Window": Refusal(
        ValueError,
        r"A window must hold at least one micro-batch\. Got an empty Window\. Skip empty windows ",
        CUT,
        Window([]),
    ),
    "rows that differ in a Window": Refusal(
        ValueError,
        r"All arrays of a batch must have the same number of rows\. Got 6 rows in window\[1\]\[0\] "
        r"and 4 rows in window\[1\]\[1\]\.",
        CUT,
        Window([(X, X), (X, X[:4])]),
    ),
    "a Window of other structures": Refusal(
        ValueError,
        r"All micro-batches of a window must have the same structure\. Got microbatch\['x'\] an? "
        r"(array|tensor) in window\[0\] and microbatch\['y'\] an? (array|tensor) in window\[1\]\. "
        r"Make them with the same collate function\. Or pass weight=.* See docs/guides/rows\.md\.$",
        CUT,
        Window([{"x": X}, {"y": X}]),
    ),
    "a complex weight": Refusal(
        TypeError,
        REAL.format("complex64"),
        weight=lambda ops, batch: ops.cast(ops.sum(batch), "complex64"),
    ),
    "a complex weight of Python": Refusal(
        TypeError, REAL.format("complex"), weight=lambda ops, batch: {"loss": 1j}
    ),
    "a negative weight": Refusal(
        ValueError, WEIGHT.format(r"-1\.0"), weight=lambda ops, batch: -1.0, reads=True
    ),
    "a weight of NaN": Refusal(
        ValueError,
        WEIGHT.format("nan"),
        weight=lambda ops, batch: ops.sum(batch) * float("nan"),
        reads=True,
    ),
    "an infinite weight": Refusal(
        ValueError, WEIGHT.format("inf"), weight=lambda ops, batch: float("inf"), reads=True
    ),
    "a weight per row": Refusal(
        ValueError,
        FORM.format(r"shape \(2,\)", "loss"),
        weight=lambda ops, batch: ops.sum(batch, 1),
    ),
    "a list as weight": Refusal(
        ValueError,
        FORM.format(r"(\[1, 2\]|shape \(2,\))", "loss"),
        weight=lambda ops, batch: [1, 2],
    ),
    "no weight": Refusal(ValueError, FORM.format("None", "loss"), weight=lambda ops, batch: None),
    "text as weight": Refusal(
        ValueError, FORM.format("'4'", "loss"), weight=lambda ops, batch: "4"
    ),
    "a term's weight per row": Refusal(
        ValueError,
        FORM.format(r"shape \(2,\)", "a"),
        weight=lambda ops, batch: {"a": ops.sum(batch, 1)},
    ),
    "weights of other terms": Refusal(
        ValueError,
        r"weight must name the same terms as the loss\. Got loss terms \['a', 'b'\] and weight "
        r"terms \['a'\]\. Return one weight for each term; None marks a term that does not depend ",
        loss=lambda ops, value, batch: {"a": value, "b": value},
        weight=lambda ops, batch: {"a": 1},
    ),
    "one weight for terms": Refusal(
        ValueError,
        r"weight must name the same terms as the loss\. Got loss terms \['a', 'b'\] and weight "
        r"terms \['loss'\]\.",
        loss=lambda ops, value, batch: {"a": value, "b": value},
        weight=lambda ops, batch: 1,
    ),
    "weights that come and go": Refusal(
        ValueError,
        r"weight must return the same terms for every micro-batch, None for the same ones\. Got "
        r"\{'a': 'a weight'\} and later \{'a': 'None'\}\. Return 0\.0 for a term without items ",
        CUT,
        Window([X[:2], X[:1]]),
        loss=lambda ops, value, batch: {"a": value},
        weight=lambda ops, batch: {"a": 1 if batch.shape[0] == 2 else None},
    ),
    "a loss per row": Refusal(
        ValueError,
        r"A loss must be a scalar mean\. Got loss_fn\(batch\) with shape \(2,\)\. Reduce it to ",
        loss=lambda ops, value, batch: value * ops.sum(batch, 1),
    ),
    "a term per row": Refusal(
        ValueError,
        r"A loss must be a scalar mean\. Got loss_fn\(batch\)\['b'\] with shape \(2,\)\. Reduce ",
        loss=lambda ops, value, batch: {"a": value, "b": value * ops.sum(batch, 1)},
    ),
    "an integer loss": Refusal(
        TypeError,
        r"A loss must have a floating dtype\. Got int32\. Cast what it is computed from to a float",
        loss=lambda ops, value, batch: ops.cast(value, "int32"),
    ),
    "a number as loss": Refusal(
        TypeError,
        r"A loss must be a scalar tensor, or a dict of scalar tensors\. Got loss_fn\(batch\) of "
        r"type float\. If it returns \(loss, aux\), pass has_aux=True\.$",
        loss=lambda ops, value, batch: 3.0,
    ),
    "of NumPy": Refusal(
        TypeError,
        r"A loss must be a tensor of \w+\. Got (float64|ndarray)\. Compute it with \w+ ",
        loss=lambda ops, value, batch: np.float64(3.0),
        feature="a loss of another library is refused",
    ),
    "a pair as loss": Refusal(
        TypeError,
        r"A loss must be a scalar tensor, or a dict of scalar tensors\. Got loss_fn\(batch\) of "
        r"type tuple\. If it returns \(loss, aux\), pass has_aux=True\.$",
        loss=lambda ops, value, batch: (value, 3),
    ),
    "no terms": Refusal(
        ValueError,
        r"A loss must have at least one term\. Got an empty dict\. Return a scalar, or a dict of ",
        loss=lambda ops, value, batch: {},
    ),
    "aux without a pair": Refusal(
        TypeError,
        r"With has_aux=True a loss function must return \(loss, aux\)\. Got tuple\. Return a pair,",
        {"has_aux": True},
        loss=lambda ops, value, batch: (value, 1, 2),
    ),
    "a loss that is no function": Refusal(
        TypeError,
        LOSS_FUNCTION,
        {"loss_fn": 3},
    ),
    "a weight that is no function": Refusal(
        TypeError, FUNCTION.format("weight", "weight", "weight"), {"weight": 3}
    ),
}


def bad_input_is_refused(engine: Any, compiled: Any, name: str) -> None:
    """The law of this table: the error, its text, and parameters and `.grad` as before."""
    found = REFUSALS[name]
    params = engine.parameters({"w": np.full((), 2.0)})
    before = engine.values(params)
    options = {"microbatch_size": 2, **found.options}
    calls = []

    def loss_fn(params: Any, batch: Any) -> Any:
        calls.append(name)
        value = params["w"] * 1.0
        return value if found.loss is None else found.loss(engine.ops, value, batch)

    if found.weight is not None:
        options["weight"] = lambda batch: found.weight(engine.ops, batch)
    text = found.text.replace("{loss}", engine.loss_argument)
    batch = mapped(lambda x: None if x is None else engine.array(x), found.batch)
    loss_fn = options.pop("loss_fn", loss_fn)
    # When they trace, TensorFlow puts lines before a text and JAX puts lines behind it.
    with pytest.raises(found.error, match=re.compile(text, re.MULTILINE)):
        engine.program(loss_fn, params, compiled=compiled, **options)(batch)
    after = engine.values(params)
    assert len(after) == len(before)
    assert all((a == b).all() for a, b in zip(after, before, strict=True))
    if found.loss is None and not found.reads:
        assert not calls, "the loss ran before the call was refused"
