"""A loss and its weights as named terms.

A loss is one mean, or a dict of means whose sum is the loss; each term is divided by a weight of
its own. Everything that engines refuse about either is refused here, with the same texts.
"""

from collections.abc import Mapping
from typing import Any

from virtualbatch.window.tree import rank

# Name of the only term of a loss that is not a dict.
SINGLE = "loss"


def loss_terms(loss: Any) -> dict[Any, Any]:
    """The terms of what a loss function returned.

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
    """Splits what a loss function returned into the loss and what it gave beside it.

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
    """The weights of one micro-batch, by term name, as the weight function returned them."""
    return dict(weight) if isinstance(weight, Mapping) else {SINGLE: weight}


def check_same_terms(loss: Mapping[Any, Any], weight: Mapping[Any, Any]) -> None:
    """Refuses weights that do not belong to the terms of the loss.

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


def check_steady_weights(later: Mapping[Any, Any], first: Mapping[Any, Any]) -> None:
    """Refuses weights whose names, or whose Nones, change within a window.

    Args:
        later: weights of a micro-batch by term name, as the weight function returned them.
        first: the same of the window's first micro-batch.

    Raises:
        ValueError: the names differ, or a term is None in only one of them.
    """
    if _marked(later) != _marked(first):
        raise ValueError(
            "weight must return the same terms for every micro-batch, None for the same ones. "
            f"Got {_marked(first)} and later {_marked(later)}. "
            "Return 0.0 for a term without items in a micro-batch."
        )


def _marked(weight: Mapping[Any, Any]) -> dict[Any, str]:
    return {name: "None" if value is None else "a weight" for name, value in weight.items()}
