"""How many rows a micro-batch and its window have."""

from typing import Any, NamedTuple

from keras import ops


class Rows(NamedTuple):
    """Rows of a micro-batch and of its window.

    Numbers on the host stay there. As tensors they would have to be copied to the device, and some
    backends wait for such a copy.

    Fields:
        here: rows of the micro-batch; int or integer scalar.
        window: rows of the whole batch; int or integer scalar.
        stretch: the padded length over the length to which the rows of a packed micro-batch and
            their targets are trimmed. 1.0 if no target is trimmed.
    """

    here: Any
    window: Any
    stretch: Any = 1.0

    @property
    def on_host(self) -> bool:
        """Whether `here` and `window` are Python numbers."""
        return isinstance(self.here, int) and isinstance(self.window, int)

    @property
    def is_stretched(self) -> bool:
        """Whether padding may have been trimmed from the targets."""
        return not isinstance(self.stretch, float) or self.stretch != 1.0

    def share(self, dtype: str) -> Any:
        """`here / window`, formed in float64: a float, or a scalar of the given dtype."""
        if self.on_host:
            return self.here / self.window
        return ops.cast(ops.cast(self.here, "float64") / ops.cast(self.window, "float64"), dtype)


def unstretched(batch: Any) -> Any:
    """The stretch of micro-batches whose rows are not trimmed."""
    del batch
    return 1.0
