"""Lightning: a training that may be killed at any moment, and goes on to the same bits.

Kill it and start it again, as often as you like: its last line stays the same. Lightning saves no
random numbers, and no place in an epoch: so they are saved here, at the end of each epoch.
"""

import hashlib
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import virtualbatch.lightning as vb

FILE = Path("resume_lightning", "last.ckpt")
warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(500, 20)
rows = TensorDataset(x, (x @ torch.randn(20, 3)).argmax(1))


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.2), nn.Linear(32, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):  # anew for each epoch, whose number alone says how it is shuffled
        shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(self.current_epoch))
        # A loader that begins draws a number: from a generator of its own, not from dropout's.
        return DataLoader(Subset(rows, shuffled.tolist()), 100, generator=torch.Generator())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["random"] = torch.get_rng_state()  # on a GPU torch.cuda.get_rng_state_all too

    def on_load_checkpoint(self, checkpoint):
        torch.set_rng_state(checkpoint["random"])


net = Net()
vb.accumulate(net, microbatch_size=25)
kept = ModelCheckpoint(FILE.parent, FILE.stem, enable_version_counter=False)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
anew = {"reload_dataloaders_every_n_epochs": 1}
trainer = lightning.Trainer(accelerator="cpu", max_epochs=5, callbacks=[kept], **anew, **quiet)
saved = torch.load(FILE)["global_step"] if FILE.exists() else 0
print(f"begins after {saved} updates", flush=True)
trainer.fit(net, ckpt_path=FILE if saved else None)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in net.parameters())
print(f"{trainer.global_step} updates, weights {hashlib.sha256(weights).hexdigest()[:16]}")
FILE.unlink()
