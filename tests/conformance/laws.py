"""The laws: each takes an engine, and raises AssertionError where the engine breaks it.

`program(loss_fn, params, ...)` of an engine gives a function of a batch or a Window.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tests.conformance import problems
from tests.conformance.adapters.base import Result, leaves, mapped
from tests.conformance.problems import SUMMANDS, problem
from tests.oracle import EPSILON, EXACT, assert_all_close, assert_close, tolerance

from virtualbatch.window.window import Window

ROWS = 10
# name -> (rows, how they are cut)
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "even": (12, {"microbatch_size": 4}),
    "ragged": (ROWS, {"microbatch_size": 4}),
    "one micro-batch": (4, {"microbatch_size": 8}),
    "one row each": (3, {"microbatch_size": 1}),
}
# The same for half precision: sizes of micro-batches, powers of two, in every mode.
EXACT_CUTS = {
    "even": [4, 4, 4],
    "ragged": [4, 2, 1],
    "one micro-batch": [4],
    "one row each": [1, 1, 1],
}
# name -> options of calls, and sizes of Windows, for one batch of 7 rows.
CUTS_OF_ONE_BATCH: dict[str, list[Any]] = {
    "some": [{"microbatch_size": 3}, {"accumulation_steps": 2}, [1, 4, 2]],
    "further": [
        {"microbatch_size": 1},
        {"microbatch_size": 7},
        {"microbatch_size": 100},
        {"accumulation_steps": 1},
        {"accumulation_steps": 100},
        {"microbatch_size": 3, "accumulation_steps": 3},
        [7],
        [2, 2, 3],
    ],
}


def split(batch: Any, sizes: Any) -> Window:
    """A Window of micro-batches of these sizes."""
    stops = np.cumsum(sizes)
    return Window(
        mapped(lambda x, a=stop - size, b=stop: x[a:b], batch)
        for size, stop in zip(sizes, stops, strict=True)
    )


def arrays(engine: Any, batch: Any, dtype: str = "float64") -> Any:
    return mapped(lambda x: engine.array(x, dtype), batch)


def rounded(engine: Any, structure: Any, dtype: str) -> Any:
    """The numbers that an engine sees, in float64."""
    return mapped(lambda x: engine.numpy(engine.array(x, dtype)), structure)


def assert_result(result: Result, loss: Any, gradients: Any, rtol: float = EXACT) -> None:
    assert_close(result.loss, loss, rtol)
    assert set(result.gradients) == set(gradients)
    assert_all_close(leaves(result.gradients), leaves(gradients), rtol)


def network(engine: Any, name: str, dtype: str = "float64") -> tuple[Any, Any, dict[str, Any]]:
    """Parameters, loss function and options of a problem."""
    found = problem(name, engine.ops, problems.network(engine.ops))
    params = engine.parameters(problems.parameters(), dtype)
    return params, found.loss_fn, {"weight": found.weight} if found.weight else {}


def equals_the_uncut_batch(engine: Any, compiled: Any, name: str, cut: str, dtype: str) -> None:
    if dtype == "bfloat16":
        return _half_precision_is_rounded_once(engine, compiled, name, cut)
    rows, options = CUTS[cut]
    params, loss_fn, weight = network(engine, name, dtype)
    batch = problems.data(rows)
    values = rounded(engine, problems.parameters(), dtype)
    due = problems.reference(name, values, rounded(engine, batch, dtype))
    run = engine.program(loss_fn, params, compiled=compiled, **options, **weight)
    result = run(arrays(engine, batch, dtype))
    assert_result(result, *due, EXACT if dtype == "float64" else tolerance(dtype, rows * SUMMANDS))
    assert {result.loss_dtype, *leaves(result.dtypes)} == {dtype}
    return None


def _half_precision_is_rounded_once(engine: Any, compiled: Any, name: str, cut: str) -> None:
    sizes = EXACT_CUTS[cut]
    batch, values = problems.exact_data(sizes), problems.EXACT_PARAMETERS
    loss, gradients, size = problems.exact_reference(name, values, batch)
    found = problem(name, engine.ops, problems.linear(engine.ops))
    params = engine.parameters(values, "bfloat16")
    weight = {"weight": found.weight} if found.weight else {}
    run = engine.program(found.loss_fn, params, compiled=compiled, **weight)
    result = run(split(arrays(engine, batch, "bfloat16"), sizes))
    # One rounding is half an epsilon. Where terms have different shares, their ratio, each
    # product with it and the sum of the terms may be rounded too.
    roundings = 4 if "terms" in name else 1
    wide = tolerance("float32", len(sizes)) * size
    for actual, due in ((result.loss, loss), (result.gradients["weight"], gradients["weight"])):
        scale = size if roundings > 1 else np.abs(due)
        off = np.abs(actual - due)
        allowed = roundings * EPSILON["bfloat16"] / 2 * scale + wide
        assert (off <= allowed).all(), f"off by {off}, allowed {allowed}"
    assert {result.loss_dtype, *leaves(result.dtypes)} == {"bfloat16"}


def uncut_is_the_reference(engine: Any, name: str) -> None:
    params, loss_fn, _ = network(engine, name)
    batch = problems.data(ROWS)
    due = problems.reference(name, problems.parameters(), batch)
    assert_result(engine.plain(loss_fn, params, arrays(engine, batch)), *due)


def order_of_rows_does_not_matter(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "tokens")
    batch = problems.data(ROWS)
    due = problems.reference("tokens", problems.parameters(), batch)
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=4, **weight)
    for seed in (1, 2):
        order = np.random.default_rng(seed).permutation(ROWS)
        assert_result(run(arrays(engine, mapped(lambda x, o=order: x[o], batch))), *due)


def any_cut_is_the_same(engine: Any, compiled: Any, cuts: list[Any]) -> None:
    params, loss_fn, weight = network(engine, "tokens")
    batch = problems.data(7)
    due = problems.reference("tokens", problems.parameters(), batch)
    for cut in cuts:
        options, given = (cut, batch) if isinstance(cut, dict) else ({}, split(batch, cut))
        run = engine.program(loss_fn, params, compiled=compiled, **options, **weight)
        assert_result(run(arrays(engine, given)), *due)


def terms_by_rows_are_means_over_rows(engine: Any, compiled: Any) -> None:
    params, loss_fn, _ = network(engine, "terms by rows")
    batch = problems.data(ROWS)
    due = problems.reference("terms by rows", problems.parameters(), batch)
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=4)
    assert_result(run(arrays(engine, batch)), *due)


def an_empty_micro_batch_adds_nothing(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "tokens")
    batch = problems.data(6)
    batch["mask"][2:4] = 0
    due = problems.reference("tokens", problems.parameters(), batch)
    # Padding may hold anything, and 0 times NaN is NaN.
    batch["x"][2:4] = np.nan
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=2, **weight)
    assert_result(run(arrays(engine, batch)), *due)


def an_empty_term_adds_nothing(engine: Any, compiled: Any) -> None:
    # The tokens of a micro-batch are all masked, so that its mean is 0 / 0, but its rows count.
    params, loss_fn, weight = network(engine, "terms")
    batch = problems.data(6)
    batch["mask"][2:4] = 0
    due = problems.reference("terms", problems.parameters(), batch)
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=2, **weight)
    assert_result(run(arrays(engine, batch)), *due)


def a_window_without_weight_is_zero(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "tokens")
    batch = problems.data(5)
    batch["mask"][:] = 0
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=2, **weight)
    zeros = {name: np.zeros_like(value) for name, value in problems.parameters().items()}
    assert_result(run(arrays(engine, batch)), 0.0, zeros)


def any_weight_in_a_compiled_window_counts_as_uncut(engine: Any, compiled: Any) -> None:
    # Compiled, no value can be refused. The tokens of the second micro-batch are always all masked.
    params, loss_fn, weight = network(engine, "terms")
    run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=2, **weight)

    def batch_of(*tokens: float) -> Any:
        batch = problems.data(6)
        batch["mask"] = np.where([True, False, True], np.repeat(tokens, 2)[:, None], 0.0)
        batch["sample_weight"] = np.array([2.0, 1.0, -1.5, -0.25, 0.5, 3.0])
        return batch

    negative = batch_of(1.0, 0.0, -0.25)
    due = problems.reference("terms", problems.parameters(), negative)
    assert_result(run(arrays(engine, negative)), *due)
    # The weights of the last are no 0, but their total is.
    for first, last in ((np.nan, 1.0), (1.0, np.inf), (-np.inf, 1.0), (1.0, -1.0)):
        batch = arrays(engine, batch_of(first, 0.0, last))
        result, uncut = run(batch), engine.plain(loss_fn, params, batch)
        assert not np.isfinite(result.loss)
        for found, whole in zip(
            leaves([result.loss, result.gradients]),
            leaves([uncut.loss, uncut.gradients]),
            strict=True,
        ):
            assert (np.isfinite(found) == np.isfinite(whole)).all(), f"{found} for {whole}"


def a_term_without_weight_counts_once(engine: Any, compiled: Any) -> None:
    ops = engine.ops
    params = engine.parameters({"w": np.array([1.0, -2.0]), "v": np.array([3.0, 1.0])})
    x = np.arange(14.0).reshape(7, 2)

    def loss_fn(params: Any, batch: Any) -> Any:
        return {"rows": ops.mean(batch @ params["w"][:, None]), "v": ops.sum(params["v"] ** 2)}

    def weight(batch: Any) -> Any:
        return {"v": None, "rows": batch.shape[0]}

    for size in (1, 3, 7):
        run = engine.program(
            loss_fn, params, compiled=compiled, microbatch_size=size, weight=weight
        )
        result = run(engine.array(x))
        assert_result(result, -8.0 + 10.0, {"w": x.mean(0), "v": np.array([6.0, 2.0])})


def half_precision_sums_in_float32(
    engine: Any, compiled: Any, dtype: str, microbatches: int
) -> None:
    """Peer case F12: a narrow buffer stalls, at 256 in bfloat16 and at 2,048 in float16."""
    params = engine.parameters({"w": np.ones(())}, dtype)
    run = engine.program(
        lambda params, batch: engine.ops.mean(batch * params["w"]),
        params,
        compiled=compiled,
        microbatch_size=1,
    )
    result = run(engine.array(np.ones(microbatches), dtype))
    assert (float(result.loss), float(result.gradients["w"])) == (1.0, 1.0)
    assert (result.loss_dtype, result.dtypes) == (dtype, {"w": dtype})


def gradients_are_like_the_parameters(engine: Any, compiled: Any) -> None:
    dtypes = {"a": "float64", "b": {"c": "float32", "d": ["bfloat16", "float16"]}}
    values = mapped(lambda dtype: engine.parameters(np.full((2,), 3.0), dtype), dtypes)
    cast = engine.ops.cast

    def loss_fn(params: Any, batch: Any) -> Any:
        # Every parameter is wide where it is used: only its gradient's own dtype rounds.
        wide = [cast(found, "float64") for found in (params["a"], params["b"]["c"])]
        wide += [cast(found, "float64") for found in params["b"]["d"]]
        return engine.ops.mean(batch * sum(wide))

    run = engine.program(loss_fn, values, compiled=compiled, microbatch_size=2)
    result = run(engine.array(np.array([[1.0, 2.0], [3.0, 2.0], [2.0, 2.0]])))
    assert result.dtypes == dtypes
    assert result.gradients.keys() == dtypes.keys()
    for gradient in leaves(result.gradients):
        # The mean over three rows and two columns; a sum of halves and thirds, rounded twice.
        assert_close(gradient, [1.0, 1.0], 2 * EPSILON["bfloat16"] / 2)


def a_parameter_may_be_unused_in_some(engine: Any, compiled: Any) -> None:
    """Peer case R2: its gradient must be neither lost nor zeroed."""
    params = engine.parameters({"all": np.ones(2), "some": np.ones(2)})

    def loss_fn(params: Any, batch: Any) -> Any:
        used = params["all"] + params["some"] if batch.shape[0] == 2 else params["all"]
        return engine.ops.mean(engine.ops.sum(batch * used, -1))

    x = np.arange(6.0).reshape(3, 2)
    run = engine.program(loss_fn, params, compiled=compiled)
    for sizes, part in (([2, 1], x[:2]), ([1, 2], x[1:])):
        result = run(split(engine.array(x), sizes))
        assert_close(result.gradients["all"], x.mean(0))
        assert_close(result.gradients["some"], part.sum(0) / 3)


def aux_is_that_of_the_whole_batch(engine: Any, compiled: Any) -> None:
    ops = engine.ops
    params = engine.parameters({"w": np.ones(2)})
    for rows, size in ((7, 3), (4, 2)):
        x = np.arange(2.0 * rows).reshape(rows, 2)

        def loss_fn(params: Any, batch: Any, size: int = size) -> Any:
            outputs = ops.sum(batch * params["w"], -1)
            aux = {
                "rows": outputs,
                "mean": ops.mean(outputs),
                "counts": ops.sum(ops.cast(batch > 4, "int32")),
                # Each fits into int8, and their sum does not.
                "narrow": ops.cast(ops.sum(ops.cast(batch > 99, "int32")) + 100, "int8"),
                # As many classes as a micro-batch has rows: averaged, not concatenated.
                "classes": ops.concat([ops.sum(outputs * 0)[None] + k for k in range(size)]),
            }
            return ops.mean(outputs), (aux, [ops.sum(ops.cast(batch > 9, "int32"), 0)])

        run = engine.program(loss_fn, params, compiled=compiled, microbatch_size=size, has_aux=True)
        result = run(engine.array(x))
        aux, (by_column,) = result.aux
        assert_close(result.loss, x.sum(1).mean())
        assert_close(aux["rows"], x.sum(1))
        assert_close(aux["mean"], x.sum(1).mean())
        assert_close(aux["classes"], np.arange(size))
        assert aux["counts"] == (x > 4).sum()
        assert aux["narrow"] == 100 * -(-rows // size)
        assert (by_column == (x > 9).sum(0)).all()
        assert np.issubdtype(by_column.dtype, np.integer)


def the_loss_runs_once_per_micro_batch(engine: Any, compiled: Any) -> None:
    """Eagerly one run each; compiled one trace per shape, and none for further batches."""
    params, loss_fn, weight = network(engine, "terms")
    runs = []

    def counted(params: Any, batch: Any) -> Any:
        runs.append(batch["x"].shape)
        return loss_fn(params, batch)

    # To torch.compile the growing list would be a reason to compile again.
    found = counted if engine.traces or not compiled else loss_fn
    run = engine.program(found, params, compiled=compiled, microbatch_size=4, **weight)
    batch = arrays(engine, problems.data(ROWS))
    before = engine.compilations_so_far(0)
    run(batch)
    if not compiled:
        assert len(runs) == 3, runs
        return
    first = engine.compilations_so_far(len(runs)) - before
    assert 1 <= first <= 2, runs
    run(batch)
    run(arrays(engine, mapped(lambda x: x[::-1].copy(), problems.data(ROWS))))
    assert engine.compilations_so_far(len(runs)) - before == first, runs


def nothing_is_read_after_the_weights(engine: Any, compiled: Any) -> None:
    params, loss_fn, weight = network(engine, "terms")
    state = {"armed": False}

    def armed(params: Any, batch: Any) -> Any:
        state["armed"] = True
        return loss_fn(params, batch)

    batch = arrays(engine, problems.data(ROWS))
    run = engine.program(
        armed,
        params,
        compiled=compiled,
        refuse_reading=lambda: state["armed"],
        microbatch_size=4,
        **weight,
    )
    run(batch)
    assert state["armed"]


def one_micro_batch_is_the_ordinary_computation(engine: Any, name: str) -> None:
    params, loss_fn, weight = network(engine, name, "float32")
    batch = arrays(engine, problems.data(ROWS), "float32")
    due = engine.plain(loss_fn, params, batch)
    for size in (ROWS, 1000):
        run = engine.program(loss_fn, params, microbatch_size=size, **weight)
        result = run(batch)
        assert result.loss == due.loss
        for actual, expected in zip(leaves(result.gradients), leaves(due.gradients), strict=True):
            assert (actual == expected).all()


def a_call_leaves_no_trace_of_itself(engine: Any, compiled: Any) -> None:
    """Peer case F9: a window that is NaN spoils nothing after it."""
    params = engine.parameters({"w": np.zeros(1)})
    run = engine.program(
        lambda params, batch: engine.ops.mean(batch * params["w"]),
        params,
        compiled=compiled,
        microbatch_size=1,
    )
    spoilt, fine = (engine.array(np.array([[1.0], [second]])) for second in (np.nan, 1.0))
    assert np.isnan(run(spoilt).gradients["w"]).all()
    for _ in range(2):
        assert_close(run(fine).gradients["w"], [1.0])


@contextmanager
def _said() -> Iterator[list[str]]:
    """What is said of losses that are not finite."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "not_finite.md" in record.getMessage():
                messages.append(record.getMessage())

    logger, listener = logging.getLogger("virtualbatch"), Listener()
    logger.addHandler(listener)
    try:
        yield messages
    finally:
        logger.removeHandler(listener)


def the_micro_batch_whose_loss_is_not_finite_is_named(engine: Any) -> None:
    """Outside of a trace: once, and again after a window whose loss was finite."""
    params = engine.parameters({"w": np.ones(1)})

    def loss_fn(params: Any, batch: Any) -> Any:
        product = batch * params["w"]
        return {"first": engine.ops.mean(product), "second": engine.ops.mean(product * product)}

    run = engine.program(loss_fn, params, microbatch_size=4)
    fine = np.arange(1.0, 11.0)[:, None]
    bad = fine.copy()
    # Cut into 4, 3 and 3 rows.
    bad[5], bad[7] = -np.inf, np.nan
    for rows, due in ((fine, 0), (bad, 1), (bad, 0), (fine, 0), (bad, 1)):
        with _said() as messages:
            run(engine.array(rows))
        assert len(messages) == due
        for message in messages:
            assert message.startswith("Term 'first' of the loss is -inf in micro-batch 2 of 3 of")
            assert "(rows 4 to 6 of its batch), the first of 2 such, so its update" in message


def an_empty_micro_batch_is_not_named(engine: Any) -> None:
    """Its loss is 0 over 0, and counts for nothing."""
    params = engine.parameters({"w": np.ones(1)})
    ops = engine.ops
    run = engine.program(
        lambda params, batch: (
            ops.sum(batch["x"] * params["w"] * batch["mask"]) / ops.sum(batch["mask"])
        ),
        params,
        microbatch_size=2,
        weight=lambda batch: ops.sum(batch["mask"]),
    )
    mask = np.array([1.0, 1.0, 0.0, 0.0])
    bad = np.array([1.0, np.inf, 3.0, 4.0])
    for rows, due in ((np.arange(4.0), []), (bad, ["micro-batch 1 of 2"])):
        with _said() as messages:
            run(arrays(engine, {"x": rows, "mask": mask}))
        assert [text in message for text, message in zip(due, messages, strict=True)] == [
            True
        ] * len(due)
