"""Gradient accumulation inside the Hugging Face Trainer, exact: one line for one trainer.

The batches of an update are collected, joined into rows, weighed, and run through `loss` of the
PyTorch engine when the last one has come. The trainer keeps its loop and its backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from virtualbatch.plan.auto import Auto
from virtualbatch.transformers._certify import TrainerCertificate, certified
from virtualbatch.transformers._checks import check_accumulator, check_cut, check_trainer
from virtualbatch.transformers._seam import Seam, seam_of
from virtualbatch.transformers._update import Asked

__all__ = ["TrainerCertificate", "accumulate", "certify", "restore"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


Trainer = TypeVar("Trainer")


def accumulate(
    trainer: Trainer,
    *,
    microbatch_size: int | str | Auto | None = None,
    microbatch_tokens: int | None = None,
    weight: Callable[[Mapping[str, Any]], Any] | None = None,
    accumulator_dtype: str | None = None,
) -> Trainer:
    """Makes each update of a trainer that of its whole batch, on the memory of a micro-batch.

    The rows of one update, `per_device_train_batch_size` times `gradient_accumulation_steps` on
    each device, are the batch. Without a size they run as the trainer's own batches, and the update
    becomes exact. A size cuts them evenly, whatever the trainer's batches are; where memory runs
    out, the update runs again in smaller pieces. Logs, callbacks, counters, schedules, evaluation
    and checkpoints are the trainer's.

    What the loss was divided by is found on the first window: the trainer's own count of labels,
    rows, labels that count, tokens of completions, or nothing, for a loss that is a sum. It is
    proved by the gradients of a few rows, and what fits none of them is refused. In DPO and reward
    training a pair is one row.

    Args:
        trainer: a `transformers.Trainer`, `Seq2SeqTrainer`, a trainer of TRL, or a subclass of
            yours. Attributes of this one are set; its class stays as it is.
        microbatch_size: rows of one forward and backward on each device; "auto" or an `Auto` finds
            the size that fits and is fast.
        microbatch_tokens: tokens of one forward and backward, padding included: rows are sorted by
            length, trimmed, and packed. Needs `attention_mask`, padded on the right.
        weight: inputs of a micro-batch -> what its loss was divided by, where it cannot be found,
            such as `lambda inputs: class_weights[inputs["labels"]].sum()`. It is tried as well; a
            misfit is logged, and not refused.
        accumulator_dtype: "bfloat16" sums the gradients of a bfloat16 model in bfloat16, with
            stochastic rounding; None in float32, 4 bytes a parameter. See
            `virtualbatch.torch.backward`.

    Returns:
        The trainer.

    Raises:
        TypeError: it is no trainer.
        ValueError: it accumulates in another way, its loss compares rows, two ways to cut are
            given, or it was given before. While it trains: no weight fits its loss, or its inputs
            cannot be cut.

    Example:
        >>> trainer = transformers.Trainer(model, args, train_dataset=rows)  # doctest: +SKIP
        >>> accumulate(trainer, microbatch_size=16).train()  # doctest: +SKIP
    """
    check_trainer(trainer)
    check_cut(microbatch_size, microbatch_tokens)
    check_accumulator(accumulator_dtype, trainer)
    if seam_of(trainer) is not None:
        raise ValueError(
            "A trainer accumulates in one way. Got one that accumulate was called for already. "
            "Call restore first."
        )
    asked = Asked(microbatch_size, microbatch_tokens, weight, accumulator_dtype)
    Seam(trainer, asked).attach()
    return trainer


def restore(trainer: Trainer) -> Trainer:
    """Leaves a trainer as it was before `accumulate`.

    Does nothing to a trainer that `accumulate` was not called for.

    Args:
        trainer: the trainer.

    Returns:
        The trainer.
    """
    seam = seam_of(trainer)
    if seam is not None:
        seam.detach()
    return trainer


def certify(trainer: Trainer) -> TrainerCertificate:
    """Says whether the update that a trainer makes is that of its whole batch.

    The first update of a new data loader is computed three times, without an optimizer: its rows at
    once, by the trainer's own accumulation, and with `accumulate`. Dropout rests meanwhile. The
    whole batch must fit in memory once. The trainer is afterwards as it was before.

    Args:
        trainer: a trainer with `gradient_accumulation_steps` of 2 or more. If `accumulate` was
            called for it, its arguments are used.

    Returns:
        Two certificates: `own` and `accumulated`. The tolerance is that of the dtype, at least of
        float32, in which losses and norms of Transformers are computed.

    Raises:
        TypeError: it is no trainer.
        ValueError: see `accumulate`, or an update has one batch only.

    Example:
        >>> certify(trainer).own.raise_if_inexact()  # doctest: +SKIP
    """
    check_trainer(trainer)
    return certified(trainer)
