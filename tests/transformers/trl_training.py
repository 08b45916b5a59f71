"""Tiny models, ragged text and TRL's trainers, made in place, and one run of a trainer on them."""

import gc
import tempfile

import datasets
import torch
import trl
from datasets import Dataset
from tests.transformers.training import SMALL, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.trainer_callback import PrinterCallback

from virtualbatch.transformers import accumulate

datasets.disable_progress_bars()
# Trainers collect garbage, which takes a second where all that is imported is looked through.
gc.freeze()
# Threads have nothing to win on models this small.
torch.set_num_threads(1)
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(60))]
# What a log holds beside metrics, or what is a time.
NO_METRICS = {"epoch", "learning_rate", "step_time", "total_flos", "train_runtime"}


def tokenizer():
    """One word, one token."""
    words = {word: number for number, word in enumerate(WORDS)}
    found = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, **special)


def llama(head=LlamaForCausalLM, **config):
    """A model in float64. TRL's own output layer computes losses in float32 all the same."""
    torch.manual_seed(0)
    special = {"eos_token_id": 1, "bos_token_id": 1, "num_key_value_heads": 2}
    return head(LlamaConfig(**SMALL, **special, **config)).double()


def arguments(cls, batch, steps, **more):
    """Arguments of a trainer: `batch` rows, `steps` of them an update; plain gradient descent."""
    given = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        "data_seed": 1,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return cls(**given | more)


class Text:
    """Rows of text, ragged.

    Args:
        seed: of them.
    """

    def __init__(self, seed):
        self._draw = torch.Generator().manual_seed(seed)

    def words(self, low, high):
        """From `low` to `high - 1` words."""
        count = int(torch.randint(low, high, (1,), generator=self._draw))
        chosen = torch.randint(0, 60, (count,), generator=self._draw).tolist()
        # A completion begins with a blank, or the last word of its prompt would go on in it.
        return " " + " ".join(f"w{number}" for number in chosen)

    def rows(self, count, **lengths):
        """Rows with these columns, each from 1 to so many words."""
        return Dataset.from_list(
            [
                {name: self.words(1, most + 1) for name, most in lengths.items()}
                for _ in range(count)
            ]
        )


def sft(batch, steps, rows=23, **more):
    """Prompts and completions: 10, 10 and 3 rows."""
    return trl.SFTTrainer(
        model=llama(),
        args=arguments(trl.SFTConfig, batch, steps, **{"max_length": 64} | more),
        train_dataset=Text(5).rows(rows, prompt=7, completion=9),
        processing_class=tokenizer(),
    )


def dpo(batch, steps, rows=23, **more):
    """Pairs, and a reference that differs from the policy."""
    reference = llama()
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return trl.DPOTrainer(
        model=llama(),
        ref_model=reference,
        args=arguments(trl.DPOConfig, batch, steps, **{"max_length": 64, "beta": 1.0} | more),
        train_dataset=Text(6).rows(rows, prompt=5, chosen=8, rejected=8),
        processing_class=tokenizer(),
    )


def reward(batch, steps, rows=23, **more):
    """Pairs, and a head of one number."""
    return trl.RewardTrainer(
        model=llama(LlamaForSequenceClassification, num_labels=1),
        args=arguments(trl.RewardConfig, batch, steps, **{"max_length": 64} | more),
        train_dataset=Text(7).rows(rows, prompt=5, chosen=8, rejected=8),
        processing_class=tokenizer(),
    )


def lengths(completions, **_):
    """A reward that differs inside each group."""
    return [len(text.split()) % 7 + 0.1 * (len(text) % 3) for text in completions]


def grpo(batch, steps, kind=(trl.GRPOTrainer, trl.GRPOConfig), rewards=lengths, **more):
    """Prompts, four completions for each of three in an update of 12."""
    trainer, config = kind
    given = {"max_completion_length": 10, "num_generations": 4, "beta": 0.0}
    return trainer(
        model=llama(),
        reward_funcs=rewards,
        args=arguments(config, batch, steps, **given | more),
        train_dataset=Text(10).rows(12, prompt=5),
        processing_class=tokenizer(),
    )


def run(make, batch, steps, ours=None, **more):
    """A training; `ours` are the arguments of `accumulate`, None for the trainer's own way."""
    trainer = make(batch, steps, **more)
    trainer.remove_callback(PrinterCallback)
    if ours is not None:
        accumulate(trainer, **ours)
    return trained(trainer)


def metrics_off(found, uncut):
    """Name of a logged metric -> its largest difference in any update, relative if above 1."""
    off = {}
    for mine, its in zip(found.logs, uncut.logs, strict=True):
        assert mine.keys() == its.keys()
        for name in mine.keys() - NO_METRICS:
            relative = abs(mine[name] - its[name]) / max(1.0, abs(its[name]))
            off[name] = max(off.get(name, 0.0), relative)
    return off
