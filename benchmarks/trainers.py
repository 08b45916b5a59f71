"""The Hugging Face Trainer on ragged text: its own 16 x 8, and the same updates with `accumulate`.

A Llama of 3 layers, updates of 128 rows of 8 to 256 tokens, most of them short, on one thread. In
each round every way trains the same few updates from the same weights; the first is not timed.
Times are ratios to the trainer's own way in the same round. Losses are compared with it, for its
own way is right for this head.

Usage: python benchmarks/trainers.py [--rounds 3] [--updates 2] [--json FILE]
"""

import os
import tempfile
import time
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from command import parser_of, save
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from virtualbatch.transformers import accumulate

ROWS = 128
OWN = "own, 16 x 8"
# Way -> (rows of a batch, batches, arguments of accumulate, the most of its own time).
WAYS: dict[str, tuple[int, int, dict[str, int] | None, float | None]] = {
    OWN: (16, 8, None, None),
    "16 x 8": (16, 8, {}, 1.05),
    "128 cut by 16": (128, 1, {"microbatch_size": 16}, None),
    "16 x 8 packed by 4096": (16, 8, {"microbatch_tokens": 4096}, 1 / 1.8),
    "128 packed by 4096": (128, 1, {"microbatch_tokens": 4096}, 1 / 1.8),
}


def rows(count: int) -> list[dict[str, list[int]]]:
    """Ragged rows: lengths from 8 to 256, with a mean of about 72."""
    draw = torch.Generator().manual_seed(0)
    lengths = (8 + 248 * torch.rand(count, generator=draw) ** 3).int().tolist()
    found = [torch.randint(3, 512, (n,), generator=draw).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def collated(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded to the longest row of the batch."""
    most = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[fill] * (most - len(row[name]))] for row in batch])

    ids = padded("input_ids", 0)
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    mask = (torch.arange(most)[None] < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


class Times(transformers.TrainerCallback):
    """When each update has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())


def train(way: str, updates: int) -> tuple[float, list[float]]:
    """Seconds of an update, and the logged losses."""
    batch, steps, ours, _ = WAYS[way]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
        )
    )
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=updates + 1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows(ROWS * (updates + 1)),
            data_collator=collated,
            callbacks=[times],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        (trainer if ours is None else accumulate(trainer, **ours)).train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return (times.ends[-1] - times.ends[0]) / updates, losses


def main() -> None:
    """Measures all ways in turns, and prints a table."""
    given = parser_of(__doc__, rounds=3, updates=2).parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for way in WAYS:
            found, losses[way] = train(way, given.updates)
            seconds[way].append(found)
    print(f"{'way':24} {'seconds':>8} {'of own':>7} {'asked':>6} {'losses off':>11}")
    table = {}
    for way, (_, _, _, asked) in WAYS.items():
        of_own = median(a / b for a, b in zip(seconds[way], seconds[OWN], strict=True))
        off = max(abs(a - b) for a, b in zip(losses[way], losses[OWN], strict=True))
        table[way] = {"seconds": median(seconds[way]), "of_own": of_own, "losses_off": off}
        limit = "" if asked is None else f"{asked:.2f}"
        print(f"{way:24} {median(seconds[way]):8.2f} {of_own:7.2f} {limit:>6} {off:11.1e}")
    save(given.json, table)


if __name__ == "__main__":
    main()
