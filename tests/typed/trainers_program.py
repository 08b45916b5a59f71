"""A program for trainers whose author runs a type checker, and mistakes that it refuses."""

from typing import Any, assert_type

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from transformers import Trainer

import virtualbatch as vb
import virtualbatch.lightning as vblightning
import virtualbatch.transformers as vbtransformers


class Classifier(BoringModel):
    pass


def tokens(microbatch: dict[str, torch.Tensor]) -> torch.Tensor:
    return microbatch["attention_mask"].sum()


def train(trainer: Trainer) -> None:
    """What a script for the Hugging Face Trainer does."""
    accumulated = vbtransformers.accumulate(
        trainer, microbatch_size="auto", weight=tokens, accumulator_dtype="bfloat16"
    )
    assert_type(accumulated, Trainer)
    accumulated.train()
    found = vbtransformers.certify(trainer)
    assert_type(found, vbtransformers.TrainerCertificate)
    assert_type(found.own, vb.Certificate)
    found.accumulated.raise_if_inexact()
    assert_type(vbtransformers.restore(trainer), Trainer)


def main() -> None:
    module = vblightning.accumulate(Classifier(), microbatch_size=vb.Auto(grow_after=100))
    assert_type(module, Classifier)
    assert_type(vblightning.restore(module), Classifier)
    vblightning.accumulate(Classifier(), microbatch_size=4, weight="sum")
    vblightning.accumulate(Classifier(), microbatch_size="auto", weight=tokens)


def mistakes(trainer: Trainer, module: LightningModule, anything: Any) -> None:
    vbtransformers.accumulate(trainer, microbatch_size="auot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtransformers.accumulate(trainer, batch_size=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    vbtransformers.accumulate(trainer, weight="sum")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtransformers.accumulate(trainer, accumulator_dtype="float16")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtransformers.accumulate(trainer, microbatch_tokens="many")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vblightning.accumulate(module, microbatch_size="auot")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vblightning.accumulate(module, accumulation_steps=4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    vblightning.accumulate(module, weight="mean")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vblightning.accumulate(anything, weight=lambda batch: "rows")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
