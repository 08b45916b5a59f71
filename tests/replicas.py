"""Laws of several replicas, whose answers are worked out by hand: one parameter w = 1.

The loss is sum(m w x) / sum(m), with a penalty of `factor` w**2 beside it, a term of weight None.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """One window on two replicas.

    Fields:
        x: for each replica, one number per row.
        mask: for each replica, what each row weighs.
        size: rows of a micro-batch.
        factor: of the penalty; 0 for no such term.
        gradient: of all rows, by w.
        loss: of all rows.
    """

    x: list[list[float]]
    mask: list[list[float]]
    size: int
    factor: float
    gradient: float
    loss: float


_X = [[1, 2, 3, 4], [5, 6, 7, 8]]
_ALL = [[], [1, 2, 3, 4, 5, 6, 7, 8]]
_ONES = [[1] * 4, [1] * 4]

BY_HAND = {
    "rows 4 and 4": Case(_X, _ONES, 2, 0, 4.5, 4.5),
    "rows 1 and 7": Case([[1], _ALL[1][1:]], [[1], [1] * 7], 2, 0, 4.5, 4.5),
    "rows 0 and 8": Case(_ALL, [[], [1] * 8], 3, 0, 4.5, 4.5),
    "a token on one, four on the other": Case(_X, [[1, 0, 0, 0], [1] * 4], 2, 0, 5.4, 5.4),
    "no token on one": Case(_X, [[0] * 4, [1] * 4], 2, 0, 6.5, 6.5),
    "no token anywhere": Case(_X, [[0] * 4, [0] * 4], 2, 0, 0, 0),
    "no token beside no rows": Case(_ALL, [[], [0] * 8], 2, 0, 0, 0),
    "weights of another size on each": Case(_X, [[0.5] * 4, [2] * 4], 2, 0, 5.7, 5.7),
    "a penalty counts once": Case(_X, _ONES, 1, 0.1, 4.7, 4.6),
    "a penalty counts once beside no rows": Case(_ALL, [[], [1] * 8], 8, 0.1, 4.7, 4.6),
}
