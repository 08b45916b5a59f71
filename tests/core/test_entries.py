"""What a `rowwise` function returns must have one entry per row."""

import numpy as np
import pytest

from virtualbatch.window.entries import check_entries, check_same_structure


def test_one_entry_per_row_passes():
    traced = type("Traced", (), {"shape": (None, 3)})()
    outputs = [("output[0]", np.ones((4, 2))), ("output[1]", np.ones(4)), ("output[2]", None)]
    check_entries([*outputs, ("output[3]", traced)], 4)


@pytest.mark.parametrize(
    ("shape", "rows", "text"),
    [
        ((8,), 32, r"Got output\['z'\] with shape \(8,\) for 32 rows\. Return one entry per row"),
        ((), 1, r"with shape \(\) for 1 row\. Return one entry per row"),
        ((64, 8), 32, r"with shape \(64, 8\) for 32 rows\. Return the 2 views as outputs"),
        ((8,), 1, r"for 1 row\. Return one entry per row"),
    ],
)
def test_another_number_of_entries_is_refused(shape, rows, text):
    with pytest.raises(ValueError, match=text):
        check_entries([("output['z']", np.ones(shape))], rows)


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match=r"Got output\['n'\] of type int"):
        check_entries([("output['n']", 3)], 4)


def test_a_structure_that_changes_is_refused():
    check_same_structure(["output['z']"], ["output['z']"])
    with pytest.raises(ValueError, match=r"Got output\['z'\], and later nothing"):
        check_same_structure(["output['z']"], [])
