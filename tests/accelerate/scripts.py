"""Training scripts as Accelerate's users write them, with its own accumulation and with ours."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.masked_tokens import (
    BATCH,
    CLIP,
    EPOCHS,
    ROWS,
    Net,
    Trained,
    data,
    flat,
    labels,
    loss_of,
    optimizer_and_schedule,
)
from torch.utils.data import DataLoader

import virtualbatch.torch as vb


def forget():
    """All Accelerators of a process share what they know of it, and of the window they are in."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Script:
    """What is prepared at the top of a script, and the lines that follow its forward pass.

    Args:
        batch_size: rows that the loader gives at once.
        rows: how many there are.
        dtype: of the model.
        options: of the Accelerator.
    """

    def __init__(self, batch_size=BATCH, rows=ROWS, dtype=torch.float64, **options):
        forget()
        self.accelerator = Accelerator(cpu=True, **options)
        model = Net().to(dtype)
        optimizer, schedule = optimizer_and_schedule(model)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, DataLoader(data(rows), batch_size), schedule
        )
        self.norms, self.losses = [], []

    def update(self, loss):
        """Backward pass, clipping, update, log."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
            self.norms.append(float(norm))
            self.losses.append(loss.item())
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def loss(self, batch, **options):
        """The line that changes."""
        return vb.loss(loss_of(self.model), batch, module=self.model, weight=labels, **options)

    def trained(self):
        model = self.accelerator.unwrap_model(self.model)
        return Trained(flat(model), self.norms, self.losses, self.schedule.get_last_lr()[0])


def usual(batch_size, steps, **options):
    """Accelerate's own accumulation."""
    script = Script(batch_size, gradient_accumulation_steps=steps, **options)
    for _ in range(EPOCHS):
        for batch in script.loader:
            with script.accelerator.accumulate(script.model):
                script.update(loss_of(script.model)(batch))
    return script.trained()


def ours(size, **options):
    """The same script on whole batches, with the line changed."""
    script = Script(**options)
    for _ in range(EPOCHS):
        for batch in script.loader:
            script.update(script.loss(batch, microbatch_size=size))
    return script.trained()


def ours_in_accumulate(size, **options):
    """The same with the context left where it was."""
    script = Script(**options)
    for _ in range(EPOCHS):
        for batch in script.loader:
            with script.accelerator.accumulate(script.model):
                script.update(script.loss(batch, microbatch_size=size))
    return script.trained()


def windows(batch_size, steps, group=None, **options):
    """A loader that gives micro-batches, inside the context, which sees where it ends."""
    script = Script(batch_size, **options)
    for _ in range(EPOCHS):
        for window in vb.windows(script.loader, steps, group=group):
            with script.accelerator.accumulate(script.model):
                script.update(script.loss(window))
    return script.trained()


def by_backward_fn(size):
    """`backward`, whose micro-batches call Accelerate's backward pass each."""
    script = Script()
    for _ in range(EPOCHS):
        for batch in script.loader:
            script.losses.append(
                float(
                    vb.backward(
                        loss_of(script.model),
                        batch,
                        module=script.model,
                        microbatch_size=size,
                        weight=labels,
                        backward_fn=script.accelerator.backward,
                    )
                )
            )
            norm = script.accelerator.clip_grad_norm_(script.model.parameters(), CLIP)
            script.norms.append(float(norm))
            script.optimizer.step()
            script.schedule.step()
            script.optimizer.zero_grad()
    return script.trained()
