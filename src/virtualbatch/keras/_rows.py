"""How many rows a micro-batch and its window have."""

from typing import Any, NamedTuple

from keras import ops


class Rows(NamedTuple):
    """Rows of a micro-batch and of its window.

    Numbers of the host stay there: as a tensor, each would have to be copied to its device, and
    some backends wait for such a copy.

    Fields:
        here: rows of the micro-batch; int or integer scalar.
        window: rows of the whole batch; int or integer scalar.
    """

    here: Any
    window: Any

    @property
    def on_host(self) -> bool:
        """Whether both are Python numbers."""
        return isinstance(self.here, int) and isinstance(self.window, int)

    def share(self, dtype: str) -> Any:
        """`here / window`, formed in float64: a float, or a scalar of the given dtype."""
        if self.on_host:
            return self.here / self.window
        return ops.cast(ops.cast(self.here, "float64") / ops.cast(self.window, "float64"), dtype)
