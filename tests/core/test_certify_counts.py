"""The ways to count a batch by its own arrays: masks are preferred, what counts alike is named."""

import numpy as np
import pytest

from virtualbatch.certify.counts import candidates

IDS = np.array([[3, 1, 0, 0], [2, 5, 4, 0], [1, 0, 0, 0]])
MASK = (IDS != 0).astype("float32")


def counted(leaves):
    return {found.code: found.likewise for found in candidates(leaves, len(IDS))}


@pytest.mark.parametrize("names", [("ids", "mask"), ("mask", "ids")])
def test_a_mask_is_proposed_before_ids_that_count_alike(names):
    arrays = {"ids": IDS, "mask": MASK}
    assert counted({f"batch['{name}']": arrays[name] for name in names}) == {
        "batch['mask'].sum()": "(batch['ids'] != 0).sum()",
        "(batch['ids'][:, 1:] != 0).sum()": None,
    }


def test_one_array_is_not_said_to_count_as_itself():
    assert counted({"batch['mask']": MASK}) == {"batch['mask'].sum()": None}


def test_text_and_rows_alone_count_nothing():
    assert counted({"words": np.array(["a", "b", "c"]), "y": np.ones((3, 2))}) == {}
