"""Certifying a function of JAX, in float64 where possible."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.diagnosis import certified
from virtualbatch.certify.step import check_microbatches, refuse_window
from virtualbatch.jax._arrays import is_array
from virtualbatch.jax._batch import cut_batch
from virtualbatch.jax._certify.step import JaxTrainingStep
from virtualbatch.jax._objective import Call
from virtualbatch.jax._window import Program

_SAME_DRAWS = (
    "The loss draws random numbers and no key_argnum is given: in training all micro-batches draw "
    "the same ones, and so do all updates if the key is part of the loss. See docs/guides/state.md."
)

_READS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def certificate(
    program: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    microbatch_size: int | None,
    accumulation_steps: int | None,
    weight_takes: str,
) -> Certificate:
    """The certificate of a call; see `virtualbatch.jax.certify` and `JaxTrainingStep`.

    Raises:
        TypeError: the function reads values of its arguments.
    """
    folds_keys = program.key_argnum is not None
    # Each row keeps its random numbers, so micro-batches must not get keys of their own.
    program = program._replace(key_argnum=None)
    call = program.call(args, kwargs, None)

    def observed(call: Call, note: str) -> Certificate:
        subject = JaxTrainingStep(program, call, microbatch_size, accumulation_steps)
        subject.weight_takes = weight_takes
        if subject.draws and not folds_keys:
            subject.notes = [*subject.notes, _SAME_DRAWS]
        if note:
            subject.notes = [*subject.notes, note]
        return certified(subject)

    try:
        with jax.enable_x64(True):
            wide = jax.tree.map(_widened, (call.args, dict(call.kwargs)))
            return observed(call._replace(args=wide[0], kwargs=wide[1]), "")
    except TypeError as error:
        # JAX refuses mixed dtypes, such as a loop carry that changes its dtype.
        note = f"It does not run in float64 ({' '.join(str(error).split())[:120]})."
    try:
        return observed(call, note)
    except _READS_VALUES as error:
        raise TypeError(
            "certify compiles fun, as jit does, so fun cannot read values. Got "
            f"{type(error).__name__}: {str(error).splitlines()[0]} Use jnp.where or jax.lax.cond "
            "for what depends on values."
        ) from error


def check_cut(batch: Any, microbatch_size: int | None, accumulation_steps: int | None) -> None:
    """Refuses a cut that leaves nothing to compare, and calls inside a trace.

    Raises:
        ValueError: there is one row, or one micro-batch, or the batch is a Window or traced.
    """
    refuse_window(batch, microbatch_size)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            "certify reads values. Got a call inside jit or another trace. Call it outside."
        )
    check_microbatches(cut_batch(batch, microbatch_size, accumulation_steps, compiled=False).rows)


def _widened(leaf: Any) -> Any:
    if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(np.asarray(leaf, np.float64))
    return leaf
