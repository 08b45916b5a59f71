"""What is remembered about a loss, for as long as the code of the loss lives."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from virtualbatch.certify.proven import Proven
from virtualbatch.plan.auto import Auto
from virtualbatch.window.fingerprint import owner_of
from virtualbatch.window.not_finite import LossWatch


class Remembered(NamedTuple):
    """What is remembered about a loss.

    Fields:
        proven: the checks that were made of the loss.
        sizes: the sizes of its calls, by the kinds of their arguments.
        losses: receives the values of the loss.
    """

    proven: Proven
    sizes: dict[str, Auto]
    losses: LossWatch


_REMEMBERED: WeakKeyDictionary[Any, Remembered] = WeakKeyDictionary()


def remembered(fun: Callable[..., Any]) -> Remembered:
    """What is remembered about a loss.

    Args:
        fun: the loss, which may have been made for this call alone.
    """
    owner = owner_of(fun)
    found = _REMEMBERED.get(owner)
    if found is None:
        found = _REMEMBERED[owner] = Remembered(Proven(), {}, LossWatch())
    return found
