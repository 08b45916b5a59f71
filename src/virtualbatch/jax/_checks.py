"""Checks that refuse a call before any part of its window is computed."""

import numbers
import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from virtualbatch.jax._aux import WORDS
from virtualbatch.jax._keys import check_keys
from virtualbatch.plan.auto import check_sizes_or_auto
from virtualbatch.window.terms import is_sum

# Functions that must be given.
_ASKED_FOR = ("fun", "fn")


def check_options(
    functions: dict[str, Any],
    positions: dict[str, Any],
    microbatch_size: Any,
    accumulation_steps: Any,
) -> None:
    """Refuses options of a public verb that no call could satisfy.

    Args:
        functions: argument name -> function, or None where the function may be left out.
        positions: `batch_argnum`, `key_argnum` and, if the verb has it, `argnums`, as given.
        microbatch_size: as given.
        accumulation_steps: as given.

    Raises:
        TypeError: an argument is not a function, or a position is not an integer.
        ValueError: a size is not a positive integer, or an argument is named twice.
    """
    for name, function in functions.items():
        may_be_other = function is None or (name == "weight" and is_sum(function))
        if not callable(function) and not (name not in _ASKED_FOR and may_be_other):
            of_what = " of one batch" if name == "weight" else ""
            fix = f"{name}=lambda batch: ..." if name == "weight" else "a function."
            raise TypeError(
                f"{name} must be a function{of_what}. Got {name}={function!r}. Pass {fix}"
            )
    if microbatch_size is not None or accumulation_steps is not None:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
    argnums, batch_argnum = positions.get("argnums", ()), positions["batch_argnum"]
    key_argnum = positions["key_argnum"]
    listed = list(argnums) if isinstance(argnums, Sequence) else [argnums]
    rows = list(batch_argnum) if isinstance(batch_argnum, Sequence) else [batch_argnum]
    for name, position in [
        *(("argnums", k) for k in listed),
        *(("batch_argnum", k) for k in rows or [None]),
        ("key_argnum", 0 if key_argnum is None else key_argnum),
    ]:
        is_whole = isinstance(position, numbers.Integral) and not isinstance(position, bool)
        if not is_whole or position < 0:
            raise TypeError(
                f"{name} must hold positions of arguments, 0 or more. "
                f"Got {name}={reprlib.repr(positions[name])}. Count the arguments of fun from 0; "
                "pass the arguments themselves to the function that this call returns."
            )
    cut = [operator.index(position) for position in rows]
    taken = [operator.index(position) for position in listed]
    is_twice = len({*taken}) < len(taken)
    if is_twice or len({*cut} - {*taken, key_argnum}) < len(cut) or key_argnum in taken:
        given = [f"{name}={position}" for name, position in positions.items()]
        raise ValueError(
            f"{_listed([*positions])} must be different arguments. Got {_listed(given)}. "
            "Differentiate with respect to parameters, which belong to every row."
        )


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def check_words(aux_merge: Any, has_aux: bool) -> None:
    """Refuses unknown words in `aux_merge`.

    Raises:
        ValueError: a leaf is not one of the words, or there is no aux.
    """
    unknown = [
        word
        for word in jax.tree.leaves(aux_merge)
        if not isinstance(word, str) or word not in WORDS
    ]
    if unknown or (aux_merge is not None and not has_aux):
        raise ValueError(
            f"aux_merge must name how the leaves of aux are merged. Got aux_merge={aux_merge!r} "
            f"and has_aux={has_aux}. Pass has_aux=True, and {', '.join(map(repr, WORDS))} or None."
        )


def check_accumulator_dtype(accumulator_dtype: Any) -> None:
    """Refuses a dtype that a sum of gradients cannot have.

    Raises:
        TypeError: the dtype is not floating.
    """
    if accumulator_dtype is None:
        return
    try:
        is_wide = jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.inexact)
    except (TypeError, ValueError):
        is_wide = False
    if not is_wide:
        raise TypeError(
            "accumulator_dtype must be a floating dtype. "
            f"Got accumulator_dtype={accumulator_dtype!r}. Leave it out for float32 or wider."
        )


def check_pytrees(args: Sequence[Any]) -> None:
    """Refuses arguments whose leaves JAX cannot find.

    Raises:
        TypeError: there is such an argument.
    """
    for position, arg in enumerate(args):
        try:
            jax.tree.leaves(arg)
        # JAX sorts keys, calls the user's classes, and follows nested structures to any depth.
        except (ValueError, TypeError, RecursionError, SystemError) as error:
            raise TypeError(
                f"Arguments must be pytrees, whose leaves JAX can find. Got argument {position} "
                f"of type {type(arg).__name__}: {error}. Pass dicts with keys that can be sorted, "
                "and nest them less deeply."
            ) from error


def check_values(args: Any) -> None:
    """Refuses descriptions of arrays, which have no values.

    Raises:
        TypeError: there is a `jax.ShapeDtypeStruct`.
    """
    if jax.ShapeDtypeStruct not in map(type, jax.tree.leaves(args)):
        return
    for position, arg in enumerate(args):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise TypeError(
                    "Arrays must have values. "
                    f"Got a jax.ShapeDtypeStruct as args[{position}]{jax.tree_util.keystr(path)}. "
                    "Pass an array; only plan takes descriptions."
                )


def check_dtypes(args: Any) -> None:
    """Refuses NumPy arrays whose dtype JAX does not have. Such arrays cannot be traced.

    Raises:
        TypeError: there is such an array.
    """
    for leaf in jax.tree.leaves(args):
        if not isinstance(leaf, np.ndarray):
            continue
        try:
            jax.typeof(leaf)
        except TypeError as error:
            raise TypeError(
                "Arrays of rows must have dtypes that JAX knows. "
                f"Got an array of {leaf.dtype}. Leave it out, or turn it into numbers."
            ) from error


def check_arguments(
    args: Sequence[Any],
    batch_argnum: int | Sequence[int],
    key_argnum: int | None,
    argnums: int | Sequence[int] = (),
) -> None:
    """Refuses a call whose arguments do not fit the options.

    Raises:
        TypeError: an option names a position without a positional argument, or keys are not keys.
    """
    check_pytrees(args)
    rows = batch_argnum if isinstance(batch_argnum, Sequence) else [batch_argnum]
    differentiated = argnums if isinstance(argnums, Sequence) else [argnums]
    for name, position in [
        *(("batch_argnum", k) for k in rows),
        *(("argnums", k) for k in differentiated),
        ("key_argnum", key_argnum),
    ]:
        if position is not None and position >= len(args):
            raise TypeError(
                f"{name} must be the position of a positional argument. "
                f"Got {name}={position} and {len(args)} positional arguments. "
                "Pass that argument by position."
            )
    if key_argnum is not None:
        check_keys(args[key_argnum])
