"""Ways to count a batch: what a loss may have divided by, found among the batch's own arrays."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One way to count a batch.

    Fields:
        text: what is counted, in words.
        code: the expression to paste.
        per_row: the weight of each row.
        likewise: an expression of another array that counts these rows in the same proportion.
    """

    text: str
    code: str
    per_row: np.ndarray
    likewise: str | None = None


def candidates(leaves: Mapping[str, np.ndarray], rows: int) -> Sequence[Weight]:
    """Ways to count a batch by its own arrays, without duplicates; masks are preferred.

    Args:
        leaves: expression -> array, with rows on its first axis.
        rows: the number of rows.
    """
    found = [Weight("rows", "", np.ones(rows))]
    sources = [("", True)]
    for path, leaf in leaves.items():
        is_mask = _is_mask(leaf)
        for text, code, counted in _counts(path, leaf):
            per_row = counted.reshape(len(leaf), -1).sum(1).astype(float)
            total = per_row.sum()
            if not (np.all(np.isfinite(per_row)) and np.all(per_row >= 0) and total > 0):
                continue
            known = (np.allclose(per_row / total, w.per_row / w.per_row.sum()) for w in found)
            same = next((k for k, is_same in enumerate(known) if is_same), None)
            if same is None:
                found.append(Weight(text, code, per_row))
                sources.append((path, is_mask))
                continue
            before = found[same]
            if sources[same][0] == path:
                continue
            if is_mask and not sources[same][1]:
                # Losses divide by masks more often than by what happens to count alike.
                found[same] = before._replace(text=text, code=code, likewise=before.code)
                sources[same] = (path, True)
            elif before.likewise is None:
                found[same] = before._replace(likewise=code)
    return found[1:]


def _is_mask(leaf: np.ndarray) -> bool:
    return leaf.dtype.kind in "biuf" and bool(((leaf == 0) | (leaf == 1)).all())


def _counts(path: str, leaf: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    if leaf.dtype.kind in "fc":
        yield f"the sum of {path}", f"{path}.sum()", leaf
    yield f"the entries of {path} that are not 0", f"({path} != 0).sum()", leaf != 0
    if leaf.dtype.kind == "b":
        # A mask may mark the entries that are left out.
        yield f"the entries of {path} that are False", f"(~{path}).sum()", ~leaf
    if leaf.dtype.kind in "iu":
        # Padding is most often the smallest or the last value; PyTorch ignores -100.
        for pad in dict.fromkeys([-100, int(leaf.min()), int(leaf.reshape(-1)[-1])]):
            code = f"({path} != {pad}).sum()"
            yield f"the entries of {path} that are not {pad}", code, leaf != pad
            if leaf.ndim > 1:
                code = f"({path}[:, 1:] != {pad}).sum()"
                text = f"the entries of {path}[:, 1:] that are not {pad}"
                yield text, code, leaf[:, 1:] != pad
    if leaf.dtype.kind in "iu" and leaf.ndim == 1:
        yield f"the sum of {path}", f"{path}.sum()", leaf
