"""Heads and losses beside the common ones: what their rows look like, and what they divide by."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tests.transformers.training import (
    QUIET,
    SMALL,
    VOCABULARY,
    bert,
    causal_loss,
    model_of,
    rows_of,
)
from transformers import (
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
COUNT = 23


class Head(NamedTuple):
    """A model, its rows and its trainer.

    Fields:
        model: () -> the model.
        rows: () -> those of the data set.
        cls: of the trainer.
        is_stacked: whether rows have one length.
        dtype: in which it runs.
    """

    model: Any
    rows: Any
    cls: Any = Trainer
    is_stacked: bool = True
    dtype: torch.dtype = torch.float64


def stacked(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


class ClassWeighted(Trainer):
    """PyTorch divides by the sum of the weights of the classes that are there."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return F.cross_entropy(logits, labels, weight=CLASS_WEIGHTS.to(logits.dtype))


class RowMeans(Trainer):
    """A mean over rows of means over their tokens, on a model that would be given a count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        return (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()


class Contrastive(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        units = F.normalize(logits, dim=-1)
        return F.cross_entropy(units @ units.T * 5, torch.arange(len(units)))


class TwoMeans(Trainer):
    """A mean over tokens and one over rows, in one number: it is no multiple of either."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        tokens = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
        return tokens + 0.1 * logits[:, 0].square().mean()


class Summed(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels, reduction="sum") / 10


class OtherIgnored(Trainer):
    """Labels of 255 are ignored, as segmentation has them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        labels = torch.where(labels == -100, 255, labels)
        return F.cross_entropy(model(**inputs).logits.transpose(1, 2), labels, ignore_index=255)


def _draw(seed):
    return torch.Generator().manual_seed(seed)


def _images():
    draw = _draw(0)
    return [
        {
            "pixel_values": torch.randn(3, 16, 16, generator=draw),
            "labels": int(torch.randint(0, 3, (1,), generator=draw)),
        }
        for _ in range(COUNT)
    ]


def _tokens(seed, **more):
    draw = _draw(seed)
    found = []
    for _ in range(COUNT):
        row = {
            "input_ids": torch.randint(3, 60, (12,), generator=draw),
            "attention_mask": torch.ones(12, dtype=torch.long),
        }
        found.append(row | {name: make(row, draw) for name, make in more.items()})
    return found


def _position(most):
    return lambda row, draw: int(torch.randint(0, most, (1,), generator=draw))


def _some_tokens(row, draw):
    ids = row["input_ids"]
    keep = torch.rand(12, generator=draw) < torch.rand(1, generator=draw)
    keep[1] = True
    return torch.where(keep, ids, -100)


def _ignored_labels():
    found = rows_of("five", COUNT)
    for row in found:
        row["labels"] = [255 if label == -100 else label for label in row["labels"]]
    return found


def _sounds():
    draw = _draw(3)
    return [
        {
            "input_values": torch.randn(400, generator=draw),
            "labels": torch.randint(1, 10, (3,), generator=draw),
        }
        for _ in range(COUNT)
    ]


def _choices():
    draw = _draw(6)
    return [
        {
            "input_ids": torch.randint(3, 60, (4, 12), generator=draw),
            "attention_mask": torch.ones(4, 12, dtype=torch.long),
            "labels": int(torch.randint(0, 4, (1,), generator=draw)),
        }
        for _ in range(COUNT)
    ]


def _vit():
    size = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    return ViTForImageClassification(
        ViTConfig(**size, num_attention_heads=2, intermediate_size=32, num_labels=3, **QUIET)
    )


def _wav2vec():
    quiet = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            layerdrop=0.0,
            mask_time_prob=0.0,
            pad_token_id=0,
            ctc_zero_infinity=True,
            **dict.fromkeys(quiet, 0.0),
        )
    )


def _mixtral(with_balance):
    def make():
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
        balance = {"output_router_logits": with_balance, "router_aux_loss_coef": 0.1}
        model = MixtralForCausalLM(MixtralConfig(**SMALL, **experts, **balance))
        model.loss_function = causal_loss
        return model

    return make


def _of(head, kind, cls):
    return Head(lambda: model_of(head), lambda: rows_of(kind, COUNT), cls, is_stacked=False)


OTHERS = {
    "vit": Head(_vit, _images),
    "multiple choice": Head(lambda: bert(BertForMultipleChoice), _choices),
    "answers": Head(
        lambda: bert(BertForQuestionAnswering),
        lambda: _tokens(1, start_positions=_position(12), end_positions=_position(12)),
    ),
    "ctc": Head(_wav2vec, _sounds),
    "experts": Head(_mixtral(False), lambda: _tokens(5, labels=_some_tokens), dtype=torch.float32),
    "row means": _of("llama", "tokens", RowMeans),
    "sum": _of("sequence", "class", Summed),
    "class weights": _of("sequence", "class", ClassWeighted),
    "contrastive": _of("sequence", "class", Contrastive),
    "two means": _of("masked", "tokens", TwoMeans),
    "pretraining": Head(
        lambda: bert(BertForPreTraining),
        lambda: _tokens(4, labels=_some_tokens, next_sentence_label=_position(2)),
    ),
    # Positions 12 and 13 are outside of the text, and ignored.
    "ignored answers": Head(
        lambda: bert(BertForQuestionAnswering),
        lambda: _tokens(1, start_positions=_position(14), end_positions=_position(12)),
    ),
    "ignored labels": Head(
        lambda: model_of("token"), _ignored_labels, OtherIgnored, is_stacked=False
    ),
    "balanced experts": Head(
        _mixtral(True), lambda: _tokens(5, labels=_some_tokens), dtype=torch.float32
    ),
}
