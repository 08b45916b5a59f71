"""The random numbers that TensorFlow draws eagerly from a global seed, as they are now."""

# Eager random numbers follow from it; there is no public name for its state.
from tensorflow.python.eager import context


class EagerRandom:
    """The position of eager random numbers; without a global seed it determines nothing."""

    def __init__(self) -> None:
        self._seeded = getattr(context.context(), "_rng", None)
        self._state = self._seeded and self._seeded.getstate()

    def restore(self) -> None:
        """Lets them go on from where they were."""
        if self._seeded is not None:
            self._seeded.setstate(self._state)
            # A kernel that is kept goes on from where it was.
            context.context().clear_kernel_cache()
