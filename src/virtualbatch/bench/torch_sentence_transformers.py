"""The gradient-caching contrastive loss of sentence-transformers, called as its trainer does."""

import importlib
from typing import Any

import torch

from virtualbatch.bench.case import SHARPNESS, Case
from virtualbatch.bench.contender import PEER, Contender, looped
from virtualbatch.bench.torch_models import Problem
from virtualbatch.bench.torch_ways import weights_of


class _Sentences(torch.nn.Sequential):
    """A model that takes and returns features by name, like the models of that library."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": self[0](features["input_ids"])}


def contender(case: Case, given: Problem) -> Contender:
    """The contender of a case."""
    # Imported by name, because none of our own environments has this package.
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    loss_of = losses.CachedMultipleNegativesRankingLoss(
        _Sentences(given.model), scale=SHARPNESS, mini_batch_size=case.microbatch_size
    )
    features = [
        {"input_ids": view, "attention_mask": torch.ones(len(view), 1)} for view in given.batch
    ]

    def update() -> Any:
        given.optimizer.zero_grad()
        loss = loss_of(features, None)
        loss.backward()
        given.optimizer.step()
        return loss.detach()

    name = "CachedMultipleNegativesRankingLoss"
    return Contender(name, PEER, looped(update, float), weights_of(given.model))
