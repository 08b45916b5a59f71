"""Tiny models from configurations, ragged rows, and one run of a trainer on them in float64."""

import tempfile
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from virtualbatch.transformers import accumulate

VOCABULARY = 64
ROWS = 46
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_position_embeddings": 64,
}


def causal_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """Transformers' loss without its `.float()`, which would leave float32 in it."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    flat = shift_labels.reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, vocab_size), flat, ignore_index=-100, reduction="sum"
    )
    return losses / ((flat != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def bert(head, **config):
    return head(BertConfig(**SMALL, **QUIET, **config))


def llama(head, **config):
    return head(LlamaConfig(**SMALL, num_key_value_heads=2, **config))


def gpt2():
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **small, **quiet))


# Head -> (its model, what its rows look like).
HEADS = {
    "llama": (lambda: llama(LlamaForCausalLM), "tokens"),
    "gpt2": (gpt2, "tokens"),
    "masked": (lambda: bert(BertForMaskedLM), "tokens"),
    "token": (
        lambda: bert(BertForTokenClassification, num_labels=5, classifier_dropout=0.0),
        "five",
    ),
    "sequence": (lambda: bert(BertForSequenceClassification, num_labels=3), "class"),
    "llama-sequence": (lambda: llama(LlamaForSequenceClassification, num_labels=3), "class"),
    "regression": (lambda: bert(BertForSequenceClassification, num_labels=1), "number"),
    "multilabel": (
        lambda: bert(
            BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"
        ),
        "several",
    ),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "sequence"),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "sequence"),
}


def rows_of(kind, count=ROWS, seed=0):
    """Rows of 3 to 16 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=draw))

    found = []
    for _ in range(count):
        length = number(3, 17)
        ids = torch.randint(3, 60, (length,), generator=draw)
        row: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": [1] * length}
        if kind in ("tokens", "five"):
            keep = torch.rand(length, generator=draw) < torch.rand(1, generator=draw)
            keep[number(1, length)] = True
            row["labels"] = torch.where(keep, ids % 5 if kind == "five" else ids, -100).tolist()
        elif kind == "sequence":
            row["labels"] = torch.randint(3, 60, (number(2, 12),), generator=draw).tolist()
        elif kind == "class":
            row["labels"] = int(ids.sum() % 3)
        elif kind == "number":
            row["labels"] = float(ids.double().mean() / 30)
        elif kind == "several":
            row["labels"] = [float(x) for x in ids[:3] % 2]
        found.append(row)
    return found


def collated(rows):
    """Rows in one batch, padded to the longest."""

    def padded(name, fill):
        most = max(len(row[name]) for row in rows)
        return torch.tensor([[*row[name], *[fill] * (most - len(row[name]))] for row in rows])

    found = {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0)}
    first = rows[0]["labels"]
    is_ragged = isinstance(first, list) and isinstance(first[0], int)
    found["labels"] = (
        padded("labels", -100) if is_ragged else torch.tensor([row["labels"] for row in rows])
    )
    return found


class Trained(NamedTuple):
    """What is left of a training.

    Fields:
        weights: all of them in one vector.
        moved: how far the farthest has moved.
        logs: the trainer's log of each update.
        trainer: the trainer.
    """

    weights: torch.Tensor
    moved: float
    logs: list[dict[str, float]]
    trainer: Any

    @property
    def losses(self):
        return [log["loss"] for log in self.logs]


def weights_of(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def arguments(batch, steps, **more):
    """Arguments of a trainer: `batch` rows, `steps` of them an update."""
    given = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "data_seed": 1,
        "weight_decay": 0.01,
    }
    return TrainingArguments(**given | more)


def model_of(head):
    torch.manual_seed(0)
    model = HEADS[head][0]()
    if "ForCausalLM" in type(model).__name__ or "LMHead" in type(model).__name__:
        model.loss_function = causal_loss
    return model


def trainer_of(head, batch, steps, *, cls=Trainer, model=None, rows=None, given=None, **more):
    """A trainer of a head, before it trains."""
    model = model_of(head) if model is None else model
    rows = rows_of(HEADS[head][1]) if rows is None else rows
    trainer = cls(
        model=model,
        args=arguments(batch, steps, **more),
        train_dataset=rows,
        data_collator=collated,
        **(given or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(trainer):
    """What a trainer leaves after training."""
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Trained(after, float((after - before).abs().max()), logs, trainer)


def run(head, batch, steps, ours=None, **more):
    """A training; `ours` are the arguments of `accumulate`, None for the trainer's own way."""
    trainer = trainer_of(head, batch, steps, **more)
    if ours is not None:
        accumulate(trainer, **ours)
    return trained(trainer)


def error(found, uncut):
    """The largest difference of weights, in the largest movement of the uncut training."""
    return float((found.weights - uncut.weights).abs().max()) / uncut.moved


def loss_error(found, uncut):
    """The largest difference of a logged loss."""
    assert len(found.losses) == len(uncut.losses)
    return max(abs(a - b) for a, b in zip(found.losses, uncut.losses, strict=True))


transformers.utils.logging.set_verbosity_error()
