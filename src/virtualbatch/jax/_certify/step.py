"""A function as `certify` observes it on JAX: uncut and cut, with random bits kept by row."""

import numbers
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from virtualbatch.certify.activations import Activation, Recording
from virtualbatch.certify.randomness import axes_of_rows
from virtualbatch.certify.step import Observed, PieceWeights, TrainingStep, weights_of
from virtualbatch.jax._arrays import is_array, of_arrays, on_host
from virtualbatch.jax._batch import chosen, cut_batch
from virtualbatch.jax._jaxpr import Traced, drawn_shapes, evaluate, floating_dtypes, traced
from virtualbatch.jax._objective import Call
from virtualbatch.jax._window import Program
from virtualbatch.window.terms import of_part, weight_terms


class JaxTrainingStep(TrainingStep):
    """See `virtualbatch.certify.step.TrainingStep`.

    Args:
        program: the user's program, which folds no keys.
        call: the user's call, in the dtype to observe.
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.
    """

    def __init__(
        self,
        program: Program,
        call: Call,
        microbatch_size: int | None,
        accumulation_steps: int | None,
    ):
        self._program = program
        self._call = call
        self._weight = program.weight
        self._sizes = microbatch_size, accumulation_steps
        argnums, accumulator_dtype = program.argnums, program.accumulator_dtype
        batch = call.args[call.batch_argnum]
        arrays = [
            (keystr(path), leaf)
            for path, leaf in tree_flatten_with_path(batch)[0]
            if is_array(leaf)
        ]
        self.leaves = {f"batch{path}": on_host(leaf) for path, leaf in arrays}
        self.rows = len(arrays[0][1])
        pair = (batch, jnp.arange(self.rows))
        cut = cut_batch(pair, microbatch_size, accumulation_steps, compiled=False)
        pieces = list(cut.microbatches())
        self._microbatches = [microbatch for microbatch, _ in pieces]
        self.pieces = [np.asarray(rows) for _, rows in pieces]
        chosen = argnums if isinstance(argnums, Sequence) else [argnums]
        given = [call.args[k] for k in chosen]
        self._names = _names(given[0] if isinstance(argnums, int) else given)
        self.parameters = {name: np.asarray(leaf) for name, leaf in self._names.items()}
        self._bits: list[Any] = []
        self._axes = self._axes_of_draws()
        # One program for each number of rows is less to compile than each operation alone.
        self._compiled = of_arrays(self._by_rows, jax.jit)
        loss = jax.eval_shape(lambda: self._terms_of(self.pieces[0]))
        dtype = next(iter(loss.values())).dtype
        wide = jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
        self.epsilon = float(jnp.finfo(wide).eps)
        self.draws = bool(self._bits)
        notes = [f"Compared in {dtype}."]
        if self.draws:
            notes.append("Each row kept its random numbers, so every cut drew the same ones.")
        self.notes = notes
        dtypes = self._weight_dtypes()
        half = {dtype for dtype in dtypes if jnp.finfo(dtype).bits < 32}
        self.narrow = [f"what weight returns ({dtype})" for dtype in half]
        buffers = [] if accumulator_dtype is None else [jnp.dtype(accumulator_dtype)]
        self.narrow += [f"accumulator_dtype={d}" for d in buffers if jnp.finfo(d).bits < 32]
        inside = [d for d in (*dtypes, *buffers) if jnp.finfo(d).bits >= 32]
        run, _ = _as_program(call.fun, call.arguments(self._microbatches[0]), call.kwargs)
        inside += [dtype, *floating_dtypes(run.program)]
        self.narrowest = max(float(jnp.finfo(d).eps) for d in inside)

    def accumulated(self) -> Observed:
        """See `TrainingStep`."""
        call = self._call

        def loss_alone(*args: Any, **kwargs: Any) -> Any:
            found = self._compiled(*args, **kwargs)
            return found[0] if call.has_aux else found

        weight = of_part(self._weight, itemgetter(0))
        program = self._program._replace(fun=loss_alone, weight=weight, has_aux=False)
        args = list(call.args)
        pair = args[call.batch_argnum], jnp.arange(self.rows)
        args[call.batch_argnum] = pair
        cut = cut_batch(pair, *self._sizes, compiled=False)
        loss, gradients = program.run(tuple(args), dict(call.kwargs), cut, traced=False)
        return Observed({"loss": float(loss)}, self._named(gradients), {})

    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """See `TrainingStep`. A JAX function keeps no state, so a second run equals the first."""
        del again
        call = self._call._replace(fun=self._compiled)
        args = call.arguments(self._some(rows))
        terms, _, gradients = call.gradients(args, None if term is None else [term])
        return Observed({k: float(v) for k, v in terms.items()}, self._named(gradients), {})

    def weights(self) -> Callable[[Any], PieceWeights]:
        """See `TrainingStep`."""
        return weights_of(self._weight, self._microbatches)

    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """See `TrainingStep`."""
        del again
        recording = Recording()
        self._evaluate(self._call.arguments(self._some(rows)), self._call.kwargs, recording)
        return recording.activations

    def _some(self, rows: np.ndarray) -> tuple[Any, Any]:
        index = np.ascontiguousarray(rows)
        batch = self._call.args[self._call.batch_argnum]
        return chosen(batch, index), jnp.asarray(index)

    def _terms_of(self, rows: np.ndarray) -> dict[Any, Any]:
        call = self._call._replace(fun=self._compiled)
        return call.terms(call.arguments(self._some(rows)))[0]

    def _by_rows(self, *args: Any, **kwargs: Any) -> Any:
        """The user's function, but with (batch, row numbers) instead of a batch."""
        return self._evaluate(args, kwargs, None)

    def _evaluate(self, args: Any, kwargs: Any, recording: Recording | None) -> Any:
        position = self._call.batch_argnum
        batch, rows = args[position]
        given = (*args[:position], batch, *args[position + 1 :])
        program, arrays = _as_program(self._call.fun, given, kwargs)
        drawn = iter(range(len(self._bits)))

        def draw(bits: Any) -> Any:
            k = next(drawn)
            axis = self._axes[k]
            kept = self._bits[k]
            if axis is None:
                return kept
            each = kept.shape[axis] // self.rows
            places = (rows[:, None] * each + jnp.arange(each)).reshape(-1)
            return jnp.take(kept, places, axis)

        return evaluate(program, arrays, draw if self._bits else None, recording)

    def _axes_of_draws(self) -> list[int | None]:
        """Keeps the random bits of the whole batch, and finds their axes of rows."""
        call = self._call
        args = call.arguments(call.args[call.batch_argnum])
        whole, arrays = _as_program(call.fun, args, call.kwargs)
        shapes = drawn_shapes(whole.program)
        if not shapes:
            return []
        part, _ = _as_program(call.fun, call.arguments(self._some(self.pieces[0])[0]), call.kwargs)
        some = len(self.pieces[0])
        axes = axes_of_rows(shapes, drawn_shapes(part.program), self.rows, some)

        def bits_of(arrays: Sequence[Any]) -> list[Any]:
            found: list[Any] = []

            def keep(bits: Any) -> Any:
                found.append(bits)
                return bits

            evaluate(whole, arrays, keep)
            return found

        self._bits = jax.jit(bits_of)(arrays)
        return axes

    def _named(self, gradients: Any) -> dict[str, np.ndarray | None]:
        found = _names(gradients)
        return {
            name: np.asarray(found[name], np.float64) if name in found else None
            for name in self._names
        }

    def _weight_dtypes(self) -> set[Any]:
        """Floating dtypes of the values that `weight` returns."""
        if not callable(self._weight):
            return set()
        values = weight_terms(self._weight(self._microbatches[0])).values()
        dtypes = {value.dtype for value in values if hasattr(value, "dtype")}
        return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


def _as_program(fun: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Traced, list[Any]]:
    """A call as equations, and the arrays among its arguments."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def run(arrays: list[Any]) -> Any:
        given = iter(arrays)
        filled = [next(given) if is_array(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        result = fun(*args, **kwargs)
        for leaf in jax.tree.leaves(result):
            _check_value(leaf)
        return result

    return traced(run, arrays), arrays


def _check_value(leaf: Any) -> None:
    """Refuses a value that no compiled program can return."""
    dtype = getattr(leaf, "dtype", None)
    is_number = isinstance(leaf, numbers.Number) or dtype is not None
    if not is_number or getattr(dtype, "kind", "") in ("O", "U", "S", "M", "m"):
        raise TypeError(
            "certify compiles fun, so fun must return arrays and numbers, in its aux too. Got "
            f"{type(leaf).__name__}{'' if dtype is None else f' of dtype {dtype}'}. Leave it out "
            "of what fun returns."
        )


def _names(tree: Any) -> dict[str, Any]:
    return {
        keystr(path) or "the parameter": leaf
        for path, leaf in tree_flatten_with_path(tree)[0]
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
