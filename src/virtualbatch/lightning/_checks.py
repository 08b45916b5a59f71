"""Refuses what cannot be trained by windows, before anything is trained."""

import re
from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from virtualbatch.window.terms import SUM

# The first release that we support, and the next major release, which may change the Trainer.
_FIRST, _BEFORE = (2, 6), (3, 0)

# Supported strategies, and unsupported ones, some of which are subclasses of supported ones.
_SERVED = (SingleDeviceStrategy, DDPStrategy)
_OTHERS = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def check_version(version: str = lightning.__version__) -> None:
    """Refuses releases of Lightning whose training loop may differ.

    Args:
        version: the version of Lightning.

    Raises:
        RuntimeError: the release is older or newer than the supported ones.
    """
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not _FIRST <= found < _BEFORE:
        raise RuntimeError(
            f"virtualbatch.lightning supports Lightning from 2.6, below 3. Got {version}. Install "
            '"lightning>=2.6,<3".'
        )


def check_module(module: Any) -> None:
    """Refuses modules whose update is not made by Lightning.

    Raises:
        TypeError: the module is not a LightningModule.
        ValueError: the module uses manual optimization, or reads the loader.
    """
    if not isinstance(module, LightningModule):
        found = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            "module must be a lightning.LightningModule. "
            f"Got {found}. Pass the module before torch.compile; one of the package "
            "pytorch_lightning imports lightning instead."
        )
    if not module.automatic_optimization:
        raise ValueError(
            "accumulate needs automatic optimization. Got automatic_optimization=False. "
            "Write self.manual_backward(virtualbatch.torch.loss(...)) in training_step."
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "accumulate cuts the batch that training_step is given. "
            "Got training_step(dataloader_iter), which reads the loader itself. "
            "Write training_step(batch, batch_idx)."
        )


def check_weight(weight: Any) -> None:
    """Refuses a weight that is not a function, "sum" or None.

    Raises:
        TypeError: it is something else.
    """
    if not (weight is None or callable(weight) or (isinstance(weight, str) and weight == SUM)):
        raise TypeError(
            "weight must be a function of one batch. "
            f"Got weight={weight!r}. Pass weight=lambda batch: ..."
        )


def check_trainer(strategy: Any, callbacks: Sequence[Any]) -> None:
    """Refuses trainers that reduce gradients in another way, or search for a batch that fits.

    Args:
        strategy: the strategy of the trainer.
        callbacks: the callbacks of the trainer.

    Raises:
        ValueError: the strategy is not supported, or a callback searches for a batch size.
    """
    if not isinstance(strategy, _SERVED) or isinstance(strategy, _OTHERS):
        raise ValueError(
            "accumulate works on one device and with DDP. "
            f"Got a trainer with {type(strategy).__name__}, which splits the model or adds "
            'gradients up in its own way. Use Trainer(strategy="ddp"), or call restore(module).'
        )
    if any(isinstance(callback, BatchSizeFinder) for callback in callbacks):
        raise ValueError(
            "accumulate keeps the batch size, and cuts each batch until it fits. Got a trainer "
            "with BatchSizeFinder, which searches for a batch size that fits. Leave the callback "
            'out, and pass microbatch_size="auto".'
        )
