"""The Hugging Face Trainer: killed at any moment, a training goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same. Its checkpoints have
random states and the place in the data. One that is half written must not be taken.
"""

import hashlib
import shutil
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from virtualbatch.transformers import accumulate

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
torch.manual_seed(0)
FOLDER = Path("resume_trainer")
ids = torch.randint(5, 40, (200, 12))
labels = ids.where(torch.rand(ids.shape) < 0.3, -100)
labels[:, 0] = ids[:, 0]
rows = [{"input_ids": i.where(m < 0, 1), "labels": m} for i, m in zip(ids, labels, strict=True)]

small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
model = BertForMaskedLM(BertConfig(vocab_size=40, num_hidden_layers=1, **small))  # with dropout
args = TrainingArguments(
    str(FOLDER),
    per_device_train_batch_size=20,
    num_train_epochs=2,
    learning_rate=1e-2,
    save_steps=3,  # updates
    save_total_limit=2,
    use_cpu=True,
    report_to=[],
    disable_tqdm=True,
)
trainer = accumulate(Trainer(model, args, train_dataset=rows), microbatch_size=5)
trainer.remove_callback(transformers.PrinterCallback)
# This file of a checkpoint is written last.
whole = [file.parent for file in FOLDER.glob("checkpoint-*/trainer_state.json")]
newest = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
print(f"begins after {newest.name.split('-')[1] if newest else 0} updates", flush=True)
trainer.train(resume_from_checkpoint=str(newest) if newest else None)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
print(f"{trainer.state.global_step} updates, weights {hashlib.sha256(weights).hexdigest()[:16]}")
shutil.rmtree(FOLDER)
