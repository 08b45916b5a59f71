"""Refuses trainers that are not supported, before anything in them is changed."""

from importlib.metadata import version
from typing import Any

from virtualbatch.plan.auto import check_sizes_or_auto
from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._modules import inventory
from virtualbatch.window.packing import check_tokens

# TRL's trainers whose collators put the rejected rows behind the chosen rows.
_PAIRS = {"DPOTrainer", "RewardTrainer"}


def is_of_pairs(trainer: Any) -> bool:
    """Whether a row of this trainer is a pair."""
    return bool(_classes(trainer) & _PAIRS)


def is_of_trl(trainer: Any) -> bool:
    """Whether a trainer is from TRL and keeps lists of metrics, to which its loss appends."""
    is_its = any(each.__module__.partition(".")[0] == "trl" for each in type(trainer).__mro__)
    return is_its and hasattr(trainer, "_metrics")


def check_trainer(trainer: Any) -> None:
    """Refuses trainers whose update cannot be cut, or is accumulated by something else.

    Args:
        trainer: a `transformers.Trainer`.

    Raises:
        TypeError: it is not a trainer.
        ValueError: the version of transformers is too old, or the trainer accumulates in another
            way, uses an unsupported kind of parallelism, or has a loss that compares rows.
    """
    _check_version()
    if "Trainer" not in _classes(trainer) or not hasattr(trainer, "get_batch_samples"):
        raise TypeError(
            "accumulate takes a transformers.Trainer or a subclass of it. "
            f"Got {type(trainer).__name__}. Pass the trainer, not its model or class."
        )
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "DeepSpeed accumulates in its own engine. Got a trainer with a DeepSpeed "
            "configuration. Use DistributedDataParallel, or DeepSpeed's "
            "gradient_accumulation_steps without virtualbatch."
        )
    if args.n_gpu > 1:
        raise ValueError(
            "A batch must not be split by DataParallel as well. "
            f"Got n_gpu={args.n_gpu}. Start one process per device, with torchrun or "
            "accelerate launch."
        )
    for found, is_so in _elsewhere(trainer).items():
        if is_so:
            raise ValueError(
                f"{found} is not supported by this version. Got a trainer that uses it. "
                "Use DistributedDataParallel, or train without virtualbatch."
            )
    _check_coupled(trainer)


def _elsewhere(trainer: Any) -> dict[str, bool]:
    """Unsupported ways to make an update, in words -> whether the trainer uses them."""
    args = trainer.args
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    several = args.world_size > 1
    return {
        "FSDP through the Trainer": trainer.is_fsdp_enabled,
        "Tensor, context or sequence parallelism": bool(
            parallelism is not None
            and any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp"))
        ),
        "An optimizer that steps inside the backward pass (LOMO)": "lomo" in str(args.optim),
        "A trainer of TRL on several processes": several and is_of_trl(trainer),
    }


def _check_coupled(trainer: Any) -> None:
    """Refuses losses that look right in the first updates but compare rows later."""
    classes = _classes(trainer)
    types = getattr(trainer, "loss_type", getattr(trainer.args, "loss_type", None))
    types = [types] if isinstance(types, str) else list(types or [])
    if "KTOTrainer" in classes and types != ["apo_zero_unpaired"]:
        raise ValueError(
            "KTOTrainer compares each row with the batch's mean KL, so a cut changes it. "
            f"Got loss_type={_in_words(types)}. "
            'Use loss_type="apo_zero_unpaired", or train without virtualbatch.'
        )
    sorted_rows = [x for x in types if x.startswith("aot")]
    if "DPOTrainer" in classes and sorted_rows:
        raise ValueError(
            "This loss sorts the rows of a batch, so a cut changes it. "
            f"Got loss_type={_in_words(sorted_rows)}. "
            'Use another loss_type, such as "sigmoid", or train without virtualbatch.'
        )
    if getattr(trainer, "use_adaptive_entropy", False):
        raise ValueError(
            "This loss changes its own coefficient at each call, as if each call were an update. "
            "Got use_adaptive_entropy=True. Use a fixed entropy_coef, or train without "
            "virtualbatch."
        )
    quantile = getattr(trainer, "top_entropy_quantile", 1.0)
    if quantile < 1.0:
        raise ValueError(
            "This loss keeps the tokens of highest entropy in a batch, so a cut changes it. "
            f"Got top_entropy_quantile={quantile}. Leave it out, or train without virtualbatch."
        )


def check_cut(microbatch_size: Any, microbatch_tokens: Any) -> None:
    """Refuses two ways to cut an update at once, and sizes that are not valid.

    Raises:
        ValueError: both are given, or one is not a valid size.
    """
    if microbatch_size is not None and microbatch_tokens is not None:
        raise ValueError(
            "An update is cut by rows or by tokens. "
            f"Got microbatch_size={microbatch_size!r} and microbatch_tokens={microbatch_tokens!r}. "
            "Leave one out."
        )
    if microbatch_size is not None:
        check_sizes_or_auto(microbatch_size, None)
    if microbatch_tokens is not None:
        check_tokens(microbatch_tokens)


def check_accumulator(accumulator_dtype: str | None, trainer: Any) -> None:
    """Refuses an accumulator dtype that the engine would refuse in the first update.

    Raises:
        ValueError: the dtype is not valid, or the model has no parameter for it.
    """
    if accumulator_dtype is not None:
        rounding_seed(accumulator_dtype, inventory(trainer.model, hands_over=True))


def _check_version() -> None:
    found = version("transformers")
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < (5, 19):
        raise ValueError(
            "virtualbatch needs transformers 5.19 or newer, whose Trainer shows whether a loss is "
            f"scaled already. Got {found}. Install a newer one."
        )


def _classes(trainer: Any) -> set[str]:
    return {each.__name__ for each in type(trainer).__mro__}


def _in_words(types: list[str]) -> str:
    return repr(types[0] if len(types) == 1 else types)
