"""A loss and its weights as named terms.

A loss is one mean, or a dict of means whose sum is the loss. Each term is divided by a weight of
its own. All refusals of losses and weights are here, so every engine raises the same texts.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, Protocol, SupportsFloat, TypeAlias

from virtualbatch.window.tree import rank

# Name of the only term of a loss that is not a dict.
SINGLE = "loss"
# Stands in the place of a weight: the term is a sum, and micro-batches add up.
SUM: Literal["sum"] = "sum"

# Dtypes of real numbers, by what their names hold: float64, bfloat16, uint8, bool.
_REAL = re.compile("bool|int|float")


class Scalar(Protocol):
    """A tensor or array of any framework; at run time it must hold one number."""

    @property
    def shape(self) -> Any:
        """The empty shape."""

    @property
    def dtype(self) -> Any:
        """A dtype of the framework."""


# None is refused at run time. Type checkers infer it for Keras' operations, and Transformers
# declares it for the loss of a model.
Loss: TypeAlias = Scalar | Mapping[Any, Scalar] | None
Weight: TypeAlias = Scalar | SupportsFloat | None


class LossFn(Protocol):
    """The type of a loss function without aux, for annotations.

    It takes one batch, in the form of yours, with any number of rows. It returns the mean loss of
    these rows, or a dict from names of terms to means whose sum is the loss. A mean is a scalar
    tensor of your framework, with a floating dtype.

    Example:
        >>> import numpy as np
        >>> def squares(batch: np.ndarray) -> np.ndarray:
        ...     return np.mean(batch**2)
        >>> loss_fn: LossFn = squares
    """

    def __call__(self, batch: Any, /) -> Loss:
        """The mean loss of a batch."""


class AuxLossFn(Protocol):
    """The type of a loss function for `has_aux=True`: it returns `(loss, aux)`.

    The loss is as in `LossFn`. The aux is any nested structure of tensors.

    Example:
        >>> import numpy as np
        >>> def squares(batch: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ...     return np.mean(batch**2), {"predictions": batch}
        >>> loss_fn: AuxLossFn = squares
    """

    def __call__(self, batch: Any, /) -> tuple[Loss, Any]:
        """The mean loss of a batch, and what else the caller wants back."""


class WeightFn(Protocol):
    """The type of a function for `weight=`: what the mean loss of a micro-batch was divided by.

    It takes one micro-batch and returns a number that is 0 or more, such as its tokens that are
    not padding. For a loss of several terms it returns a dict with the same names: a number, None
    for a term that does not depend on the rows, or "sum" for a term that is a sum.

    Example:
        >>> import numpy as np
        >>> def tokens(microbatch: dict[str, np.ndarray]) -> np.ndarray:
        ...     return microbatch["mask"].sum()
        >>> weight: WeightFn = tokens
    """

    def __call__(self, microbatch: Any, /) -> Weight | Mapping[Any, Weight | str]:
        """The weight of a micro-batch."""


# The `weight` argument of an engine: a function of a micro-batch, "sum", or None for rows.
GivenWeight: TypeAlias = WeightFn | Literal["sum"] | None


def loss_terms(loss: Any) -> dict[Any, Any]:
    """The terms of a loss function's result.

    Args:
        loss: a scalar, or a mapping of term names to scalars.

    Returns:
        A dict of term name to scalar; `{"loss": loss}` for a loss of one term.

    Raises:
        TypeError: a term is not a scalar of a floating dtype.
        ValueError: a term has a shape, or the mapping is empty.
    """
    named = isinstance(loss, Mapping)
    terms = dict(loss) if named else {SINGLE: loss}
    if not terms:
        raise ValueError(
            "A loss must have at least one term. Got an empty dict. "
            "Return a scalar, or a dict of scalars."
        )
    for name, term in terms.items():
        place = f"loss_fn(batch)[{name!r}]" if named else "loss_fn(batch)"
        if not hasattr(term, "shape") or not hasattr(term, "dtype"):
            raise TypeError(
                "A loss must be a scalar tensor, or a dict of scalar tensors. "
                f"Got {place} of type {type(term).__name__}. "
                "If it returns (loss, aux), pass has_aux=True."
            )
        if rank(term) not in (0, None):
            raise ValueError(
                "A loss must be a scalar mean. "
                f"Got {place} with shape {tuple(term.shape)}. "
                "Reduce it to one number, for example by a mean over rows."
            )
    return terms


def loss_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """Splits a loss function's result into the loss and aux.

    Raises:
        TypeError: has_aux is True and the result is not a pair.
    """
    if not has_aux:
        return result, None
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            "With has_aux=True a loss function must return (loss, aux). "
            f"Got {type(result).__name__}. Return a pair, or leave has_aux out."
        )
    return result[0], result[1]


def weight_terms(weight: Any) -> dict[Any, Any]:
    """The weights of one micro-batch, by term name.

    Args:
        weight: what the weight function returned.

    Returns:
        A dict of term name to weight, None for a term that does not depend on the rows, "sum" for
        one that is a sum.

    Raises:
        TypeError: a weight is not a real number, such as a complex one.
        ValueError: a weight is not one number.
    """
    if not isinstance(weight, Mapping):
        _check_number(SINGLE, weight)
        return {SINGLE: weight}
    for name, value in weight.items():
        if value is not None:
            _check_number(name, value)
    return dict(weight)


def of_part(weight: GivenWeight, part: Callable[[Any], Any]) -> GivenWeight:
    """A weight for an object that holds the micro-batch as a part.

    Args:
        weight: the `weight` argument of an engine.
        part: that object -> the micro-batch.
    """
    if weight is None or isinstance(weight, str):
        return weight
    return lambda whole: weight(part(whole))


def is_sum(weight: Any) -> bool:
    """Whether a weight is the word "sum". An array is never compared with the word."""
    return isinstance(weight, str) and weight == SUM


def _check_number(name: Any, value: Any) -> None:
    if is_sum(value):
        return
    is_array = hasattr(value, "shape")
    dtype = getattr(value, "dtype", type(value).__name__)
    dtype = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
    if dtype == "complex" or (hasattr(value, "dtype") and not _REAL.search(dtype)):
        raise TypeError(
            "A weight must be a real number. "
            f"Got {dtype} for term {name!r}. "
            "Return what the loss was divided by, of an integer or floating dtype."
        )
    if is_array and rank(value) in (0, None):
        return
    if not is_array and hasattr(value, "__float__") and not isinstance(value, str | bytes):
        _check_fits(value)
        return
    got = f"shape {tuple(value.shape)}" if is_array else repr(value)
    raise ValueError(
        "A weight must be one number per micro-batch and term. "
        f"Got {got} for term {name!r}. "
        "Reduce it to what the loss was divided by, for example by a sum over the mask."
    )


def _check_fits(value: Any) -> None:
    try:
        float(value)
    except OverflowError:
        raise ValueError(
            "A weight must be a finite number, 0 or more. "
            f"Got one of type {type(value).__name__} that no float can hold. "
            "Return what the loss was divided by."
        ) from None


def check_total(names: Collection[Any]) -> None:
    """Refuses a dict of terms that may hold a total beside its parts.

    Args:
        names: the names of the terms of a loss without a dict of weights.

    Raises:
        ValueError: one of several terms is called "loss".
    """
    if SINGLE in names and len(names) > 1:
        others = ", ".join(repr(name) for name in names if name != SINGLE)
        raise ValueError(
            "A dict of terms is added up, so a total and its parts would count twice. "
            f"Got the term 'loss' beside {others}. Return the total alone and the parts with "
            "has_aux=True; or call that term otherwise if it is only a part."
        )


def check_same_terms(loss: Collection[Any], weight: Collection[Any]) -> None:
    """Refuses weights that do not belong to the terms of the loss.

    Args:
        loss: names of the terms of the loss.
        weight: names of the weights.

    Raises:
        ValueError: the names differ.
    """
    if set(loss) != set(weight):
        raise ValueError(
            "weight must name the same terms as the loss. "
            f"Got loss terms {sorted(map(str, loss))} and weight terms "
            f"{sorted(map(str, weight))}. "
            "Return one weight for each term; None marks a term that does not depend on the rows."
        )


class WeightFunction:
    """The weight function of one window, which must name the same terms for every micro-batch.

    Args:
        weight: micro-batch -> a weight, or a dict of them by term name.
    """

    def __init__(self, weight: WeightFn):
        self._weight = weight
        self._first: dict[Any, str] | None = None

    def values(self, microbatch: Any) -> list[Any]:
        """Weights of the terms that depend on the rows, in the order of the first micro-batch.

        Raises:
            ValueError: a weight is not one number, or the first micro-batch had other names, or
                None for other names.
        """
        terms = weight_terms(self._weight(microbatch))
        found = {name: _kind(value) for name, value in terms.items()}
        if self._first is None:
            self._first = found
        if found != self._first:
            raise ValueError(
                "weight must return the same terms for every micro-batch, None for the same ones. "
                f"Got {self._first} and later {found}. "
                "Return 0.0 for a term without items in a micro-batch."
            )
        return [terms[name] for name, kind in self._first.items() if kind == _WEIGHED]

    @property
    def certain(self) -> frozenset[Any]:
        """Names of the terms whose weight is None or "sum". They are never empty."""
        return frozenset(n for n, kind in (self._first or {}).items() if kind != _WEIGHED)

    def by_name(self, vectors: Iterable[Any], steady: Any, of_a_sum: Any) -> dict[Any, Any]:
        """Term name -> the vector that was made from its weights.

        Args:
            vectors: one for each weight that `values` returns, in that order.
            steady: stands for a term that does not depend on the rows.
            of_a_sum: stands for a term that is a sum.
        """
        given = iter(vectors)
        certain = {"None": steady, SUM: of_a_sum}
        names = self._first or {}
        return {n: next(given) if kind == _WEIGHED else certain[kind] for n, kind in names.items()}


_WEIGHED = "a weight"


def _kind(weight: Any) -> str:
    if isinstance(weight, str):
        return SUM
    return "None" if weight is None else _WEIGHED
