"""The state of the random numbers that TensorFlow draws eagerly from a global seed."""

# Eager random numbers follow from the state of this context, which has no public name.
from tensorflow.python.eager import context


class EagerRandom:
    """The state of eager random numbers. Without a global seed it does not determine them."""

    def __init__(self) -> None:
        self._seeded = getattr(context.context(), "_rng", None)
        self._state = self._seeded and self._seeded.getstate()

    def restore(self) -> None:
        """Sets random numbers back to the kept state."""
        if self._seeded is not None:
            self._seeded.setstate(self._state)
            # A cached kernel has a state of its own, and would not start again from the kept one.
            context.context().clear_kernel_cache()
