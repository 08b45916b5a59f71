"""Settings, figures and conclusion of the demo.

Plain data and arithmetic, without a framework, processes or output.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

MODES = ("small", "whole", "accumulated")

# The largest difference that counts as rounding, relative to the largest move of a weight. Two
# orders of summation differ by rounding, and training carries the difference along. A wrong
# gradient changes weights as much as training does, which is a thousand times this limit.
_AGREEMENT = 1e-3


@dataclass(frozen=True)
class Settings:
    """The settings of all three runs.

    Args:
        epochs: passes over the training rows, the same for every run.
        batch_size: rows of the large batch.
        microbatch_size: rows of the small batch, and of one micro-batch of the large batch.
        seed: the seed of the initial weights and of the row order.

    Raises:
        ValueError: a number is not positive, or the micro-batch is larger than the batch.
    """

    epochs: int = 10
    batch_size: int = 512
    microbatch_size: int = 32
    seed: int = 1

    def __post_init__(self) -> None:
        for option in ("epochs", "batch_size", "microbatch_size"):
            if getattr(self, option) < 1:
                flag = "--" + option.replace("_", "-")
                raise ValueError(
                    f"{flag} must be a positive integer. Got {flag} {getattr(self, option)}."
                )
        if self.microbatch_size > self.batch_size:
            raise ValueError(
                "--microbatch-size must not exceed --batch-size. "
                f"Got {self.microbatch_size} and {self.batch_size}. "
                f"Pass --microbatch-size {self.batch_size} or less."
            )


@dataclass(frozen=True)
class RunResult:
    """Figures of one run, measured by its child process.

    Args:
        mode: one of `MODES`.
        updates: optimizer updates made.
        train_loss: mean over the training rows after the last epoch.
        test_accuracy: share of the test rows that are classified correctly, 0 to 1.
        fit_seconds: time in `fit`, tracing included.
        peak_memory_bytes: peak during `fit` above `framework_memory_bytes`.
        framework_memory_bytes: memory of the process when `fit` began: Python, the imported
            framework, its thread pools, the data, the built model.
        peak_memory_method: how the peak was measured, see `virtualbatch.demo.peak_memory`.
        farthest_weight: the largest distance that a weight moved from its initial value.
        losses: mean training loss of each update's batch, taken before the update.
        seconds: the seconds since `fit` began, at the end of each update.
    """

    mode: str
    updates: int
    train_loss: float
    test_accuracy: float
    fit_seconds: float
    peak_memory_bytes: int
    framework_memory_bytes: int
    peak_memory_method: str
    farthest_weight: float
    losses: Sequence[float]
    seconds: Sequence[float]


@dataclass(frozen=True)
class DemoResult:
    """The three runs side by side.

    Args:
        settings: the settings of all runs.
        small: trained with small batches only.
        whole: trained with the large batch at once.
        accumulated: trained with the large batch, accumulated from micro-batches.
        small_difference: largest weight difference between `small` and `whole`.
        accumulated_difference: largest weight difference between `accumulated` and `whole`.
    """

    settings: Settings
    small: RunResult
    whole: RunResult
    accumulated: RunResult
    small_difference: float
    accumulated_difference: float

    @property
    def runs(self) -> tuple[RunResult, RunResult, RunResult]:
        """The runs in the order in which they ran."""
        return self.small, self.whole, self.accumulated

    @property
    def weights_agree(self) -> bool:
        """Whether accumulation gave the weights of the whole batch, up to rounding."""
        return self.accumulated_difference <= _AGREEMENT * self.whole.farthest_weight

    @property
    def conclusion(self) -> str:
        """One sentence about the figures, also if they are unfavourable."""
        return f"{self._accumulation_clause()}; {self._batch_size_clause()}."

    def to_json(self) -> str:
        """The figures, the verdict and the sentence as JSON text."""
        return json.dumps(
            asdict(self) | {"weights_agree": self.weights_agree, "conclusion": self.conclusion},
            indent=2,
        )

    def _accumulation_clause(self) -> str:
        whole, accumulated = self.whole, self.accumulated
        verdict = "gave the weights" if self.weights_agree else "did NOT give the weights"
        memory = accumulated.peak_memory_bytes / max(whole.peak_memory_bytes, 1)
        seconds = accumulated.fit_seconds / whole.fit_seconds
        cost = f"{memory:.0%} of its memory and {seconds:.2f} times its time"
        return (
            f"Accumulated from micro-batches of {self.settings.microbatch_size}, the batch of "
            f"{self.settings.batch_size} {verdict} of the whole batch (largest difference "
            f"{self.accumulated_difference:.1e}; training moved weights by up to "
            f"{whole.farthest_weight:.1e}) "
            + (f"in {cost}" if memory < 1 else f"but saved no memory here: it took {cost}")
        )

    def _batch_size_clause(self) -> str:
        small, large = self.small, self.accumulated
        if large.test_accuracy > small.test_accuracy:
            remark = "a gain that a larger batch does not always bring"
        else:
            remark = "a larger batch is not better by itself"
        return (
            f"against small batches of {self.settings.microbatch_size} it made {large.updates} "
            f"updates instead of {small.updates}, took {large.fit_seconds:.1f} s instead of "
            f"{small.fit_seconds:.1f} s and reached {large.test_accuracy:.1%} test accuracy "
            f"instead of {small.test_accuracy:.1%}: {remark}"
        )
