"""Each micro-batch's share of the gradient, and the sums turned back into gradients.

If every variable and term is float32 or wider, the backward pass starts from the share, which costs
nothing. Otherwise gradients are computed unscaled, and multiplied in the wide dtype of the sums.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from virtualbatch.window.shares import accumulator_dtype

_HALF = (tf.float16, tf.bfloat16)


def watch_tensors(tape: tf.GradientTape, variables: Sequence[Any]) -> None:
    """Watches the entries of `variables` that are tensors. A tape watches variables by itself."""
    tape.watch([x for x in variables if isinstance(x, tf.Tensor)])


def scaled_gradients(
    tape: tf.GradientTape,
    terms: Sequence[Any],
    shares: Sequence[Any],
    variables: Sequence[Any],
    may_be_empty: bool,
) -> list[Any]:
    """Sum over terms of share times gradient, in the dtype of the sums.

    Args:
        tape: the tape that recorded the terms; persistent if there are several terms that may be
            empty.
        terms: scalar losses.
        shares: one scalar per term; floats, or float64 tensors.
        variables: flat list of variables.
        may_be_empty: whether a share may be 0 because its term has no items. The gradient of such
            a term may be NaN, so zeros replace it. Multiplying by 0 would keep the NaN.

    Returns:
        One tensor, IndexedSlices or None per variable.
    """
    if not may_be_empty:
        return _backward(tape, terms, shares, variables)
    if len(terms) == 1:
        return _selected(shares[0], _backward(tape, terms, shares, variables))
    whole = tf.reduce_all(tf.not_equal(tf.stack(list(shares)), 0))
    if tf.executing_eagerly():
        return (_together if whole else _apart)(tape, terms, shares, variables)
    pattern: list[Any] = []

    def present(gradients: list[Any]) -> list[Any]:
        pattern[:] = gradients
        return [gradient for gradient in gradients if gradient is not None]

    found = iter(
        tf.cond(
            whole,
            lambda: present(_together(tape, terms, shares, variables)),
            lambda: present(_apart(tape, terms, shares, variables)),
        )
    )
    return [None if gradient is None else next(found) for gradient in pattern]


def selected_loss(terms: Sequence[Any], shares: Sequence[Any], may_be_empty: bool) -> Any:
    """Sum over terms of share times loss, in float32 or wider. Empty terms are left out."""
    dtype = accumulator_dtype(_widest(terms).name)
    total = tf.zeros([], dtype)
    for term, share in zip(terms, shares, strict=True):
        part = tf.cast(term, dtype) * tf.cast(share, dtype)
        total += tf.where(tf.equal(share, 0), tf.zeros_like(part), part) if may_be_empty else part
    return total


def scalar_terms(terms: Iterable[Any]) -> list[tf.Tensor]:
    """Terms as scalar tensors that can be differentiated. Call it while the tape records.

    Raises:
        TypeError: a term is not a tensor of TensorFlow, or its dtype is not floating.
    """
    terms = list(terms)
    for term in terms:
        if not tf.is_tensor(term):
            raise TypeError(
                f"A loss must be a tensor of TensorFlow. Got {type(term).__name__}. "
                "Compute it with TensorFlow operations, or it has no gradient."
            )
        if not tf.as_dtype(term.dtype).is_floating:
            raise TypeError(
                f"A loss must have a floating dtype. Got {tf.as_dtype(term.dtype).name}. "
                "Cast what it is computed from to a float."
            )
    terms = [tf.convert_to_tensor(term) for term in terms]
    # A trace may not know the rank, as after py_function.
    return [term if term.shape.rank == 0 else tf.ensure_shape(term, []) for term in terms]


def loss_dtype(terms: Sequence[Any]) -> tf.DType:
    """The dtype in which the loss of these terms is returned."""
    return _widest(terms)


def check_same_dtype(dtypes: Sequence[tf.DType]) -> None:
    """Refuses losses of several dtypes in one window.

    Args:
        dtypes: the dtypes of the losses of all micro-batches so far.

    Raises:
        TypeError: the dtypes differ.
    """
    if dtypes[-1] != dtypes[0]:
        raise TypeError(
            "A loss must have the same dtype for every micro-batch. "
            f"Got {dtypes[0].name}, and later {dtypes[-1].name}. Cast it to one of them."
        )


def split_sparse(gradients: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Separates dense gradients, which are added, from values and indices, which are concatenated.

    Returns:
        (one tensor or None per variable, two tensors or Nones per variable).
    """
    dense, rows = [], []
    for gradient in gradients:
        sparse = isinstance(gradient, tf.IndexedSlices)
        dense.append(None if sparse else gradient)
        rows += [gradient.values, gradient.indices] if sparse else [None, None]
    return dense, rows


def add(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """The sums of two lists of tensors, entry by entry. None adds nothing."""
    return [x if y is None else y if x is None else x + y for x, y in zip(a, b, strict=True)]


def widened(gradient: Any, factor: Any) -> Any:
    """A gradient times a scalar, multiplied in the dtype of the sums.

    Args:
        gradient: tensor, IndexedSlices or None.
        factor: scalar of a floating dtype.

    Returns:
        A tensor, IndexedSlices or None, as given, in the dtype of the sums.
    """

    def scale(x: Any) -> Any:
        wide = tf.cast(x, accumulator_dtype(x.dtype.name))
        return wide * tf.cast(factor, wide.dtype)

    return _mapped(scale, gradient)


def finished(dense: Sequence[Any], rows: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """The window's gradients in the form and dtype of `tape.gradient`.

    Args:
        dense: sums of dense gradients, or None.
        rows: concatenated values and indices of sparse gradients, or Nones; two per variable.
        variables: flat list of variables.

    Returns:
        One tensor, IndexedSlices or None per variable.
    """
    result = []
    for total, values, indices, variable in zip(
        dense, rows[::2], rows[1::2], variables, strict=True
    ):
        dtype = tf.as_dtype(variable.dtype)
        if values is not None and total is not None:
            total = tf.tensor_scatter_nd_add(total, indices[:, None], values)
        if total is not None:
            result.append(tf.cast(total, dtype))
        elif values is not None:
            if values.dtype != dtype:
                # The optimizer adds the slices of one row, and in half precision that sum stalls.
                # So they are added here, before the cast.
                indices, places = tf.unique(indices)
                values = tf.math.unsorted_segment_sum(values, places, tf.size(indices))
            result.append(tf.IndexedSlices(tf.cast(values, dtype), indices, tf.shape(variable)))
        else:
            result.append(None)
    return result


def _widest(terms: Sequence[Any]) -> tf.DType:
    return max((term.dtype for term in terms), key=lambda dtype: dtype.size)


def _backward(
    tape: tf.GradientTape, terms: Sequence[Any], shares: Sequence[Any], variables: Sequence[Any]
) -> list[Any]:
    if not any(tf.as_dtype(x.dtype) in _HALF for x in (*variables, *terms)):
        upstream = [tf.cast(share, term.dtype) for term, share in zip(terms, shares, strict=True)]
        return tape.gradient(list(terms), list(variables), output_gradients=upstream)
    # In the backward pass a share would be rounded to few bits and could underflow. So only the
    # ratio of the shares goes through it.
    largest = tf.reduce_max(tf.abs(tf.stack([tf.cast(share, tf.float64) for share in shares])))
    upstream = [
        tf.cast(tf.math.divide_no_nan(tf.cast(share, tf.float64), largest), term.dtype)
        for term, share in zip(terms, shares, strict=True)
    ]
    gradients = tape.gradient(list(terms), list(variables), output_gradients=upstream)
    return [widened(gradient, largest) for gradient in gradients]


def _mapped(fn: Any, gradient: Any) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(fn(gradient.values), gradient.indices, gradient.dense_shape)
    return fn(gradient)


def _selected(share: Any, gradients: Sequence[Any]) -> list[Any]:
    empty = tf.equal(share, 0)
    return [
        _mapped(lambda x: tf.where(empty, tf.zeros_like(x), x), gradient) for gradient in gradients
    ]


_together = _backward


def _apart(
    tape: tf.GradientTape, terms: Sequence[Any], shares: Sequence[Any], variables: Sequence[Any]
) -> list[Any]:
    """One backward pass per term, so that an empty term can be left out."""
    total: list[Any] = [None] * len(variables)
    for term, share in zip(terms, shares, strict=True):
        part = _selected(share, _backward(tape, [term], [share], variables))
        total = [added(x, y) for x, y in zip(total, part, strict=True)]
    return total


def added(a: Any, b: Any) -> Any:
    """Sum of two gradients: tensors, IndexedSlices or None."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.concat([a.values, b.values], 0),
            tf.concat([a.indices, b.indices], 0),
            a.dense_shape,
        )
    return tf.convert_to_tensor(a) + tf.convert_to_tensor(b)
