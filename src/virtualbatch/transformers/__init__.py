"""Gradient accumulation inside the Hugging Face Trainer, exact: one line for one trainer.

The batches of an update are collected. When the last one has come, they are joined into rows,
weighed, and run through `loss` of the PyTorch engine. The trainer keeps its loop and its backward
pass.
"""

from typing import Literal, TypeVar

from virtualbatch.plan.auto import Auto
from virtualbatch.transformers._certify import TrainerCertificate, certified
from virtualbatch.transformers._checks import check_accumulator, check_cut, check_trainer
from virtualbatch.transformers._seam import Seam, seam_of
from virtualbatch.transformers._update import Asked
from virtualbatch.window.terms import WeightFn

__all__ = ["TrainerCertificate", "accumulate", "certify", "restore"]


def __dir__() -> list[str]:
    """The public names, so that completion shows no others."""
    return __all__


Trainer = TypeVar("Trainer")


def accumulate(
    trainer: Trainer,
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    microbatch_tokens: int | None = None,
    weight: WeightFn | None = None,
    accumulator_dtype: Literal["bfloat16", "float32"] | None = None,
) -> Trainer:
    """Makes each update of a trainer that of its whole batch, with the memory of a micro-batch.

    The whole batch is the rows of one update: `per_device_train_batch_size` times
    `gradient_accumulation_steps` on each device. Without a size the rows run in the batches of the
    trainer, and the update becomes exact. With a size they are cut evenly, whatever the batches of
    the trainer are. If memory runs out, the update runs again in smaller micro-batches. Logs,
    callbacks, counters, schedules, evaluation and checkpoints stay those of the trainer.

    At the first update the library finds what the loss was divided by: the count of labels that
    the trainer makes, rows, labels that count, tokens of completions, or nothing for a loss that
    is a sum. Gradients of a few rows must confirm it, or the update is refused. In DPO and reward
    training one pair is one row.

    Args:
        trainer: a `transformers.Trainer`, a `Seq2SeqTrainer`, a trainer of TRL, or your subclass
            of one. Only attributes of this object are set, and its class does not change.
        microbatch_size: the rows of one forward and backward on each device. `"auto"` or an `Auto`
            plans the size at the first update.
        microbatch_tokens: the tokens of one forward and backward, padding included, instead of a
            size. Rows are sorted by length, packed and trimmed. The inputs need an
            `attention_mask` and padding on the right.
        weight: a function of the inputs of a micro-batch that returns what its loss was divided
            by, such as `lambda inputs: class_weights[inputs["labels"]].sum()`. Pass it where that
            cannot be found. It is checked as well, but a mismatch is only logged.
        accumulator_dtype: `"bfloat16"` sums the gradients of a bfloat16 model in bfloat16, with
            stochastic rounding. None or `"float32"` sums in float32, which takes 4 bytes per
            parameter. See `virtualbatch.torch.backward`.

    Returns:
        The trainer.

    Raises:
        TypeError: `trainer` is not a trainer.
        ValueError: the trainer accumulates in another way, its loss compares rows, two ways to cut
            are given, or `accumulate` was called for it before.
        ValueError: while it trains: no weight fits its loss, or its inputs cannot be cut.

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
    """Takes back what `accumulate` did to a trainer.

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
    """Checks whether the update that a trainer makes is that of its whole batch.

    The first update of a new data loader is computed three times, without an optimizer: all rows
    at once, with the accumulation of the trainer, and with `accumulate`. So the whole batch must
    fit in memory once. Dropout is turned off. The trainer is as before the call.

    All three are in the dtypes of the model. The tolerance is that of the coarsest of these dtypes
    and at least that of float32, because Transformers computes losses and norms in float32.

    Args:
        trainer: a trainer with `gradient_accumulation_steps` of 2 or more. If `accumulate` was
            called for it, its arguments are used.

    Returns:
        Two certificates, `own` for the trainer, and `accumulated` for `accumulate`.

    Raises:
        TypeError: `trainer` is not a trainer.
        ValueError: the update has one batch only, or an argument is wrong as in `accumulate`.

    Example:
        >>> certify(trainer).own.raise_if_inexact()  # doctest: +SKIP
    """
    check_trainer(trainer)
    return certified(trainer)
