"""What a plan depends on."""

from typing import NamedTuple


class Leaf(NamedTuple):
    """Shape and type of one array of a batch.

    Fields:
        place: the expression for the array, such as "batch['x']".
        shape: the shape of one row.
        dtype: the name of the dtype.
    """

    place: str
    shape: tuple[int, ...]
    dtype: str


class Signature(NamedTuple):
    """What a plan depends on.

    Fields:
        program: engine with its version, device and parameters, in words.
        loss: what is computed, as a fingerprint.
        rows: rows of the batch.
        leaves: arrays of the batch, in order.
        limit: the memory limit as a text; `Auto` fills it in.
    """

    program: str
    loss: str
    rows: int
    leaves: tuple[Leaf, ...]
    limit: str = ""

    def covers(self, other: "Signature") -> bool:
        """Whether a plan for this signature also fits `other`.

        `other` may have fewer rows, and shorter ones. All else must be the same. So text that is
        padded to many lengths needs a new plan only for longer rows.
        """
        return (
            (self.program, self.loss, self.limit) == (other.program, other.loss, other.limit)
            and self.rows >= other.rows
            and len(self.leaves) == len(other.leaves)
            and all(
                mine.place == its.place
                and mine.dtype == its.dtype
                and len(mine.shape) == len(its.shape)
                and all(m >= n for m, n in zip(mine.shape, its.shape, strict=True))
                for mine, its in zip(self.leaves, other.leaves, strict=True)
            )
        )
