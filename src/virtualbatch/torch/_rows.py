"""The caller's rows, which must be unchanged if a window is to run again."""

from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._faults import StatefulLossError


class RowsBefore:
    """Detects tensors of a batch that are changed in place after this object was made.

    Args:
        batch: a batch or a Window, as it was given.
    """

    def __init__(self, batch: ReadBatch):
        self._versions = [
            (place, tensor, tensor._version)
            for microbatch in batch.given
            for place, tensor in microbatch.tensors()
            # Inference tensors have no version, and cannot be changed outside inference mode.
            if not tensor.is_inference()
        ]

    def refuse_changed(self, error: BaseException) -> bool:
        """Refuses to run a window again on rows that its first attempt has changed.

        Args:
            error: the out-of-memory error.

        Returns:
            False: no row was changed, so the window may run again.

        Raises:
            StatefulLossError: a tensor was changed.
        """
        for place, tensor, before in self._versions:
            if tensor._version != before:
                raise StatefulLossError(
                    "A loss function must not change its rows: a window that runs out of memory "
                    "runs again on them, in smaller pieces.",
                    f"{place} of shape {tuple(tensor.shape)} changed in place",
                    "Compute a new tensor: x = x * 2 instead of x.mul_(2).",
                ) from error
        return False
