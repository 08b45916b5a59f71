"""The Hugging Face Trainer with one line more: its update becomes that of the whole batch.

python examples/hf_trainer.py
"""

import tempfile
from pydoc_data.topics import topics

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from virtualbatch.transformers import accumulate, certify

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
TEXT = topics["assert"].encode()


def rows():
    """Bytes of a text in rows of 8 to 40, of which some are masked."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        length, start = (int(torch.randint(8, n, (), generator=draw)) for n in (41, 900))
        ids = torch.tensor(list(TEXT[start : start + length]))
        masked = torch.rand(length, generator=draw) < 0.5 * torch.rand((), generator=draw)
        masked[0] = True
        yield {"input_ids": ids.where(~masked, 1), "labels": ids.where(masked, -100)}


def collated(batch):
    ids, labels = ([row[name] for row in batch] for name in ("input_ids", "labels"))
    ids, labels = pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()}


def trainer_of(batch, steps):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=128, num_hidden_layers=2, **small, **quiet))
    size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    more = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, save_strategy="no", **size, **more)
    return Trainer(model, args, train_dataset=[*rows()], data_collator=collated)


def trained(trainer):
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


print("Its own 4 x 5:", str(certify(trainer_of(4, 5)).own).splitlines()[0])
whole = trained(trainer_of(20, 1))
for way, found in [("its own", trainer_of(4, 5)), ("accumulate", accumulate(trainer_of(4, 5)))]:
    print(f"{way:12} weights off by {float((trained(found) - whole).abs().max()):.0e}")
