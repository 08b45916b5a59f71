"""Axes of rows of random numbers, told by two runs."""

import pytest

from virtualbatch.certify.randomness import axes_of_rows


def test_axes_of_rows():
    whole, part = [(12, 5), (3, 24), (7,)], [(4, 5), (3, 8), (7,)]
    assert axes_of_rows(whole, part, 12, 4) == [0, 1, None]


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ([(12,)], []),
        ([(13,)], [(5,)]),
        ([(12,)], [(12, 1)]),
        ([(12, 12)], [(4, 4)]),
        ([(12,)], [(5,)]),
    ],
)
def test_numbers_that_do_not_belong_to_rows(whole, part):
    with pytest.raises(ValueError, match="do not belong to rows"):
        axes_of_rows(whole, part, 12, 4)
