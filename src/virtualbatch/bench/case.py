"""A case of the benchmark: a model, a batch and its cut, the same for every framework."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# Keras counts once per backend, because each backend runs a different program.
ENGINES = ("torch", "jax", "tensorflow", "keras-tensorflow", "keras-jax", "keras-torch")
# The first is bound by overhead, the next two by arithmetic. `tokens` has a loss that divides by
# the number of valid tokens, which differs in all micro-batches. `pairs` has a contrastive loss,
# which compares every row with every other.
MODELS = ("MLP", "CNN", "transformer", "tokens", "pairs")
CLASSES = 10
# Adam divides by the root of its second moment, so its first update hides a factor in the gradient.
# A large epsilon makes the factor visible, and costs no time.
RATE, EPSILON = 0.01, 0.1
WORDS, LENGTH = 1000, 32
# The contrastive loss multiplies cosine similarities by this factor.
SHARPNESS = 20.0
_SEED = 0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        engine: one of `ENGINES`.
        model: one of `MODELS`.
        microbatch_size: rows of one micro-batch.
        accumulation_steps: micro-batches of one batch.
        scale: width of the layers, relative to the usual one.
    """

    engine: str
    model: str
    microbatch_size: int = 32
    accumulation_steps: int = 8
    scale: int = 1

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.microbatch_size * self.accumulation_steps

    @property
    def framework(self) -> str:
        """The framework that computes, without Keras."""
        return self.engine.removeprefix("keras-")

    @property
    def width(self) -> int:
        """Units of a layer, channels of a convolution, features of a token."""
        usual = {"MLP": 128, "CNN": 16, "transformer": 64, "tokens": 64, "pairs": 64}
        return self.scale * usual[self.model]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input row."""
        return {
            "MLP": (64,),
            "CNN": (16, 16, 1),
            "transformer": (LENGTH, self.width),
            "tokens": (LENGTH,),
            "pairs": (LENGTH, self.width),
        }[self.model]

    def batch(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Inputs and classes. Every call returns the same values.

        For `tokens`: ids, padded with 0 at the end, and a class for each id. For `pairs`: two views
        of each row, and no classes.
        """
        random = np.random.default_rng(_SEED)
        rows = self.rows
        if self.model != "tokens":
            x = random.normal(size=(rows, *self.input_shape)).astype("float32")
            if self.model == "pairs":
                return x, x + random.normal(size=x.shape).astype("float32")
            return x, random.integers(0, CLASSES, rows)
        lengths = random.integers(1, LENGTH + 1, rows)
        # Neighbours have similar lengths, as in much text, so a mean of means is far off.
        lengths.sort()
        ids = random.integers(1, WORDS, (rows, LENGTH)) * (np.arange(LENGTH) < lengths[:, None])
        return ids.astype("int32"), random.integers(0, CLASSES, (rows, LENGTH))
