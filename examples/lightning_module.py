"""Lightning: updates of 120 rows with masked tokens; its own accumulation, and ours by one line."""

import logging
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import virtualbatch.lightning as vb

WORDS, ROWS, LENGTH = 29, 600, 12


def tokens(batch):
    return (batch[1] != -100).sum()


class Neighbours(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(WORDS, 16), nn.Tanh(), nn.Linear(16, WORDS)).double()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def trained(batch_size, steps=1, **ours):
    module = Neighbours()
    if ours:
        vb.accumulate(module, **ours)  # the line
    drawn = torch.Generator().manual_seed(1)
    words = torch.randint(1, WORDS, (ROWS, LENGTH), generator=drawn)
    kept = torch.rand(ROWS, LENGTH, generator=drawn) < torch.linspace(0.2, 0.9, ROWS)[:, None]
    rows = TensorDataset(words, torch.where(kept, words.roll(-1, 1), -100))
    quiet = {f"enable_{x}": False for x in ("checkpointing", "progress_bar", "model_summary")}
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=steps, accelerator="cpu", logger=False, **quiet
    )
    trainer.fit(module, DataLoader(rows, batch_size=batch_size))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    whole = trained(120)
    for name, found in [
        ("Lightning's own, 6 batches of 20", trained(20, 6)),
        ("ours, 6 batches of 20", trained(20, 6, weight=tokens)),
        ("ours, a batch of 120 cut by 16", trained(120, microbatch_size=16, weight=tokens)),
    ]:
        print(f"{name:34} off by {(found - whole).abs().max():.1e}")
