"""Trainers with losses of their own, as users write them."""

import torch
from torch.nn import functional
from transformers import Trainer


class RowMeans(Trainer):
    """Its loss is the mean over rows of the mean over the tokens of each."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        losses = functional.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
        counts = labels != -100
        loss = ((losses * counts).sum(1) / counts.sum(1)).mean()
        return (loss, outputs) if return_outputs else loss


class ClassWeighted(Trainer):
    """Its loss is a mean by weights of classes, on all ranks or on some."""

    on_ranks = (0, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        here = self.args.process_index in self.on_ranks
        weights = torch.tensor([0.2, 1, 5]) if here else None
        return functional.cross_entropy(logits, labels, weight=weights)
