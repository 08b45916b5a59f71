"""A module that logs, counts and returns everything, what watches its training, and a run of it."""

from functools import partial

import lightning
import torch
import torchmetrics
from lightning.pytorch.loggers import Logger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import virtualbatch.lightning as vb

WORDS, LENGTH = 11, 6


class Net(lightning.LightningModule):
    """Words in, words out; its loss is the mean over the tokens that count."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(WORDS, 8)
        self.head = torch.nn.Linear(8, WORDS)
        self.mean = torchmetrics.MeanMetric()
        self.make = optimizer or partial(torch.optim.AdamW, lr=0.01)
        self.calls = 0
        self.seen = []
        self.double()

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        self.calls += 1
        self.seen.append((batch_idx, len(ids)))
        logits = self(ids)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        largest = logits.detach().amax((1, 2))
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("item", loss.item(), on_step=True, on_epoch=True)
        self.log("largest", largest.mean(), True, None, True, True)
        self.log_dict({"rows": float(len(ids))}, reduce_fx="sum", on_step=True, on_epoch=False)
        self.log("highest", ids.max().double(), reduce_fx=torch.max, on_step=True, on_epoch=True)
        self.mean(largest)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return {"loss": loss, "largest": largest, "spread": logits.detach().std(-1).mean()}

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def tokens(batch):
    return (batch[1] != -100).sum()


def rows(count=46):
    """Rows with more and more tokens that count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (count, LENGTH), generator=generator)
    share = torch.linspace(0.05, 1.0, count)[:, None]
    kept = torch.rand(count, LENGTH, generator=generator) < share
    kept[:, 0] = True
    return TensorDataset(ids, torch.where(kept, ids.roll(1, 1), -100))


class Watch(lightning.Callback):
    """What happens in a training, in order, and what can be read there."""

    def __init__(self):
        self.events, self.outputs, self.norms, self.rates = [], [], [], []

    def on_train_batch_start(self, *_):
        self.events.append("batch_start")

    def on_before_zero_grad(self, *_):
        self.events.append("zero_grad")

    def on_before_backward(self, *_):
        self.events.append("before_backward")

    def on_after_backward(self, trainer, module):
        self.events.append("after_backward")
        squares = [
            p.grad.double().square().sum() for p in module.parameters() if p.grad is not None
        ]
        self.norms.append(float(sum(squares)) ** 0.5)

    def on_before_optimizer_step(self, *_):
        self.events.append("step")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.events.append("batch_end")
        self.outputs.append(outputs)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, *_):
        self.events.append("epoch_end")


class Rows(Logger):
    """A logger that keeps what it is given."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Run:
    """A module that has been trained.

    Args:
        batch: rows of a batch of the loader.
        steps: `accumulate_grad_batches`.
        ours: arguments of `accumulate`; None for Lightning alone.
        net: makes the module.
        loader: instead of one with that batch.
        options: of the Trainer.
    """

    def __init__(self, batch=20, steps=1, ours=None, net=Net, loader=None, start=None, **options):
        self.module = net()
        if start is not None:
            self.module.load_state_dict(start)
        self.start = flat(self.module)
        if ours is not None:
            vb.accumulate(self.module, **ours)
        self.watch, self.logger = Watch(), Rows()
        resumed = options.pop("ckpt_path", None)
        defaults = {
            "max_epochs": 2,
            "accumulate_grad_batches": steps,
            "gradient_clip_val": 1.0,
            "logger": self.logger,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        callbacks = [self.watch, *options.pop("callbacks", [])]
        self.trainer = lightning.Trainer(**defaults | options, callbacks=callbacks)
        loader = DataLoader(rows(), batch_size=batch) if loader is None else loader
        self.trainer.fit(self.module, loader, ckpt_path=resumed)
        self.weights = flat(self.module)
        self.log = self.logger.rows


def flat(module):
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def error(run, uncut):
    """The largest difference of a weight, as a part of the largest movement of any."""
    moved = (uncut.weights - uncut.start).abs().max()
    return float((run.weights - uncut.weights).abs().max() / moved)


def largest_difference(log, of_uncut):
    """Between two logs with the same steps and names."""
    if [(step, sorted(row)) for step, row in log] != [(s, sorted(row)) for s, row in of_uncut]:
        raise AssertionError(f"{log} has other steps or names than {of_uncut}")
    pairs = zip(log, of_uncut, strict=True)
    return max(abs(row[name] - other[name]) for (_, row), (_, other) in pairs for name in row)
