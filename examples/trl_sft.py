"""TRL: one line, and each update of SFTTrainer or DPOTrainer is that of its whole batch."""

import tempfile

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from virtualbatch.transformers import accumulate

torch.set_num_threads(1)  # threads have nothing to win on a model this small
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number + 2 for number in range(60)}
word_level = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=word_level, pad_token="<pad>", eos_token="<eos>", unk_token="<eos>"
)


def text(most):
    count = int(torch.randint(1, most, ()))
    return "".join(f" w{number}" for number in torch.randint(0, 60, (count,)).tolist())


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 62, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))


def trained(kind, config, more, rows, batch, steps, cut=None):
    """The weights after updates of 20 and 13 rows."""
    size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "bf16": False}
    how = {"learning_rate": 0.1, "optim": "sgd", "num_train_epochs": 1, "use_cpu": True}
    args = config(tempfile.mkdtemp(), **size, **quiet, **how, activation_checkpointing=False)
    trainer = kind(model(), args=args, train_dataset=rows, processing_class=tokenizer, **more)
    trainer.remove_callback(transformers.PrinterCallback)
    if cut is not None:
        accumulate(trainer, **cut)  # the line
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


start = torch.cat([parameter.detach().flatten() for parameter in model().parameters()])
sft = (SFTTrainer, SFTConfig, {})
dpo = (DPOTrainer, DPOConfig, {"ref_model": model()})
for its, columns in (sft, ("prompt", "completion")), (dpo, ("prompt", "chosen", "rejected")):
    rows = datasets.Dataset.from_list([{name: text(12) for name in columns} for _ in range(33)])
    whole = trained(*its, rows, 20, 1)
    for cut in (None, {}, {"microbatch_size": 4}, {"microbatch_tokens": 64}):
        off = (trained(*its, rows, 2, 10, cut) - whole).abs().max() / (whole - start).abs().max()
        how = "its own 2 x 10" if cut is None else f"accumulate(trainer, **{cut})"
        print(f"{its[0].__name__}, {how}: off from whole batches by {off:.0e}")
        assert cut is None or off < 1e-5, "the update is not that of the whole batch"
