"""A module that accumulates is copied, pickled, saved, resumed and restored as any other."""

import copy
import pickle
from functools import partial

import lightning
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tests.lightning.nets import Net, Rows, Run, error, flat, rows, tokens
from torch.utils.data import DataLoader

import virtualbatch.lightning as vb

OURS = {"microbatch_size": 3, "weight": tokens}


def test_restore_leaves_the_module_as_it_was():
    module = Net()
    before = dict(vars(module))

    vb.accumulate(module, **OURS)
    assert "training_step" in vars(module)
    vb.restore(module)
    vb.restore(module)

    assert vars(module) == before


def test_a_restored_module_trains_as_lightning_alone(own):
    def restored():
        module = Net()
        vb.accumulate(module, **OURS)
        vb.restore(module)
        return module

    assert torch.equal(Run(4, 5, net=restored).weights, own.weights)


def test_a_step_that_stood_on_the_module_is_used_and_put_back(uncut):
    """As that of a compiled module does."""
    steps = []

    def replaced():
        module = Net()
        step = module.training_step

        def on_instance(batch, batch_idx):
            steps.append(batch_idx)
            return step(batch, batch_idx)

        module.training_step = on_instance
        return module

    run = Run(20, 1, OURS, replaced)

    assert error(run, uncut) <= 1e-12
    assert len(steps) == 2 * (7 + 7 + 2)
    vb.restore(run.module)
    assert run.module.training_step.__name__ == "on_instance"


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deep", "pickle"],
)
def test_a_copy_trains_itself(uncut, copied):
    original = Net()
    vb.accumulate(original, **OURS)

    run = Run(20, net=lambda: copied(original))

    assert error(run, uncut) <= 1e-12
    assert run.module.calls == 2 * (7 + 7 + 2)
    assert original.calls == 0
    assert torch.equal(flat(original), uncut.start)


def test_a_copy_in_the_middle_of_an_update_takes_no_batches_along():
    """A callback copies the module while batches of an update are collected."""

    class Copies(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                found.append(copy.deepcopy(module.training_step))

    found = []
    Run(4, 5, {"weight": tokens}, max_epochs=1, callbacks=[Copies()])

    assert found[0].__getstate__()["_collected"] == found[0]._collected == []


def test_averaged_weights_are_those_of_the_uncut_run():
    """The callback keeps a deep copy of the module."""
    runs = []
    for ours in (None, OURS):
        average = EMAWeightAveraging(decay=0.5)
        run = Run(20, 1, ours, callbacks=[average])
        runs.append(run)

    assert error(runs[1], runs[0]) <= 1e-12


def _checkpoints(folder):
    return ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")


@pytest.mark.parametrize(("batch", "steps"), [(20, 1), (4, 5)])
def test_a_training_resumes_between_updates_to_the_bit(tmp_path, batch, steps):
    """Also without us, and the checkpoint has the keys of a plain module."""
    whole = Run(batch, steps, OURS, enable_checkpointing=True, callbacks=[_checkpoints(tmp_path)])
    path = tmp_path / "step=3.ckpt"
    saved = torch.load(path, weights_only=False)

    resumed = Run(batch, steps, OURS, ckpt_path=path)

    assert saved["state_dict"].keys() == Net().state_dict().keys()
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.trainer.global_step == 6
    plain = Run(batch, steps, ckpt_path=path)
    assert plain.trainer.global_step == 6


class _Evaluated(Net):
    def __init__(self):
        super().__init__()
        self.of_validation = torchmetrics.MeanMetric()
        self.validated, self.tested = [], []

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch[0]))
        self.of_validation(self(batch[0]).mean((1, 2)))
        self.log("val", self.of_validation, on_epoch=True)

    def test_step(self, batch, batch_idx):
        self.tested.append(len(batch[0]))
        # Outside training it is the step as it is written, on the whole batch.
        self.training_step(batch, batch_idx)
        assert self.seen[-1] == (batch_idx, len(batch[0]))


def test_validation_and_test_steps_are_untouched():
    """Metrics of validation are made in inference mode, and kept beside those of training."""
    loader = DataLoader(rows(), batch_size=20)
    runs = []
    for ours in (None, OURS):
        module = _Evaluated()
        if ours:
            vb.accumulate(module, **ours)
        logger = Rows()
        trainer = lightning.Trainer(
            max_epochs=2,
            val_check_interval=1,
            logger=logger,
            log_every_n_steps=1,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, loader)
        trainer.test(module, loader, verbose=False)
        runs.append((module, logger.rows))

    (whole, log), (ours, found) = runs
    assert ours.validated == whole.validated
    assert ours.tested == whole.tested == [20, 20, 6]
    values = [[row["val"] for _, row in each if "val" in row] for each in (found, log)]
    assert len(values[0]) == 6
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_step_without_a_trainer_is_the_module_s_own():
    module = Net()
    vb.accumulate(module, **OURS)
    module.log = module.log_dict = lambda *args, **kwargs: None

    output = module.training_step(rows(5).tensors, 0)

    assert module.seen == [(0, 5)]
    assert output["loss"].requires_grad


def test_a_module_trains_again_after_an_update_was_interrupted(uncut):
    class Interrupts(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise ZeroDivisionError

    module = Net()
    vb.accumulate(module, weight=tokens)
    with pytest.raises(ZeroDivisionError):
        Run(4, 5, net=lambda: module, callbacks=[Interrupts()])

    run = Run(4, 5, net=lambda: module)

    assert error(run, uncut) <= 1e-12


def test_two_optimizers_with_manual_optimization_use_loss():
    """What accumulate refuses is written with `virtualbatch.torch.loss`."""
    import virtualbatch.torch as engine

    class Two(Net):
        def __init__(self, ours):
            super().__init__()
            self.automatic_optimization, self.ours = False, ours

        def configure_optimizers(self):
            return [
                torch.optim.SGD(self.table.parameters(), 0.5),
                torch.optim.SGD(self.head.parameters(), 0.1),
            ]

        def loss(self, batch):
            logits = self(batch[0]).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, batch[1].flatten())

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                loss = self.loss(batch)
                if self.ours:
                    loss = engine.loss(
                        self.loss, batch, module=self, microbatch_size=3, weight=tokens
                    )
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    manual = {"gradient_clip_val": None}
    whole = Run(20, net=partial(Two, False), **manual)
    ours = Run(20, net=partial(Two, True), **manual)

    assert error(ours, whole) <= 1e-12
