"""What is refused, before any weight has moved, and with what to do instead."""

from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tests.lightning.nets import Net, Run, flat, rows, tokens
from torch.utils.data import DataLoader

import virtualbatch.lightning as vb
from virtualbatch.lightning._checks import check_trainer, check_version

OURS = {"microbatch_size": 3, "weight": tokens}


@pytest.mark.parametrize("version", ["2.5.6", "1.9", "3.0.0", "3.1.dev0"])
def test_releases_with_another_loop_are_refused(version):
    with pytest.raises(RuntimeError, match=r"from 2\.6, below 3\. Got .*Install"):
        check_version(version)


@pytest.mark.parametrize("version", ["2.6.0", "2.6.6", "2.10.1.post0"])
def test_releases_that_are_served(version):
    check_version(version)


def test_a_module_that_is_none_of_lightning_s():
    with pytest.raises(TypeError, match=r"Got torch\.nn.*Linear\. Pass the module before"):
        vb.accumulate(torch.nn.Linear(2, 1), microbatch_size=1)


def test_manual_optimization():
    module = Net()
    module.automatic_optimization = False

    with pytest.raises(ValueError, match=r"manual_backward\(virtualbatch\.torch\.loss"):
        vb.accumulate(module, **OURS)


def test_a_step_that_reads_the_loader():
    class Reads(Net):
        def training_step(self, dataloader_iter):
            pass

    with pytest.raises(ValueError, match=r"Got training_step\(dataloader_iter\)"):
        vb.accumulate(Reads(), **OURS)


def test_a_second_call():
    module = Net()
    vb.accumulate(module, **OURS)

    with pytest.raises(ValueError, match=r"Got Net, which accumulates already.*restore"):
        vb.accumulate(module, microbatch_size=4)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "many"])
def test_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="microbatch_size"):
        vb.accumulate(Net(), microbatch_size=size)


def test_a_weight_that_is_no_function():
    with pytest.raises(TypeError, match=r"Got weight=3\.0\. Pass weight=lambda batch"):
        vb.accumulate(Net(), weight=3.0)


def _refused(match, net=Net, steps=1, ours=OURS, batch=20, **options):
    """Trains until it is refused; the weights are as they were."""
    made = []

    def kept():
        made.append(net())
        return made[-1]

    with pytest.raises(ValueError, match=match):
        Run(batch, steps, ours, kept, **options)
    assert torch.equal(flat(made[0]), flat(net()))
    assert "log" not in vars(made[0])


@pytest.mark.proves_itself
@pytest.mark.parametrize(("batch", "steps", "size"), [(20, 1, 2), (4, 5, None)])
def test_a_weight_that_is_not_what_the_loss_is_divided_by(batch, steps, size):
    """The first update shows it, and says the weight."""
    _refused(
        r"Pass weight=lambda batch: \(batch\[1\] != -100\)\.sum\(\)",
        batch=batch,
        steps=steps,
        ours={"microbatch_size": size},
    )


def test_a_step_without_a_loss_for_some_rows():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return None if len(batch[0]) < 3 else output

    _refused(r"every micro-batch.*Got NoneType from Skips", Skips)


def test_an_optimizer_that_runs_collected_batches_again():
    """It is seen at the second call, before the update is made of too many gradients."""
    lbfgs = partial(Net, partial(torch.optim.LBFGS, lr=0.1, max_iter=3))

    with pytest.raises(ValueError, match=r"Got a second call with accumulate_grad_batches=5"):
        Run(4, 5, {"weight": tokens}, lbfgs)


def test_a_trainer_that_looks_for_a_batch_that_fits():
    with pytest.raises(ValueError, match=r"Got a trainer with BatchSizeFinder"):
        check_trainer(Run(max_epochs=0).trainer.strategy, [BatchSizeFinder()])


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_add_gradients_up_in_their_own_way(strategy):
    # Made without what they need to run.
    found = object.__new__(strategy)

    with pytest.raises(ValueError, match=f"Got a trainer with {strategy.__name__}"):
        check_trainer(found, [])


def test_fabric_uses_loss():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    module = Net()
    vb.accumulate(module, **OURS)
    model = fabric.setup(module)

    with pytest.raises(ValueError, match=r"Got a module in Fabric.*fabric\.backward"):
        model.training_step(rows(4).tensors, 0)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_batches_that_are_not_by_rows_are_taken_as_they_are_or_refused():
    """Without a size nothing is cut; a size asks for rows."""

    class Packed(Net):
        def training_step(self, batch, batch_idx):
            ids, labels, offsets = batch
            assert len(offsets) == 1
            return super().training_step((ids, labels), batch_idx)

    whole = [[*rows().tensors, torch.zeros(1)]]
    run = partial(Run, net=Packed, max_epochs=1, loader=DataLoader(whole, batch_size=None))
    reference, found = run(), run(ours={"weight": tokens})

    assert torch.equal(found.weights, reference.weights)
    with pytest.raises(ValueError, match="rows"):
        run(ours=OURS)
