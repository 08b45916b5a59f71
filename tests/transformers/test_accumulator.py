"""Sums in bfloat16 of a bfloat16 model inside a trainer, by name."""

import pytest
import torch
from tests.transformers.training import model_of, trained, trainer_of

from virtualbatch.transformers import accumulate


def made(dtype=torch.bfloat16):
    torch.set_default_dtype(torch.float32)
    given = {"num_train_epochs": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5}
    return trainer_of("masked", 20, 1, model=model_of("masked").to(dtype), **given)


def of(size, **ours):
    trainer = accumulate(made(), microbatch_size=size, **ours)
    return trained(trainer)


def test_sums_in_bfloat16_round_by_themselves_and_train_the_same_way():
    """Other bits than float32 sums, as near to the float32 model as those are, and repeatable."""
    exact = trained(accumulate(made(torch.float32), microbatch_size=4))
    wide, narrow = of(4), of(4, accumulator_dtype="bfloat16")
    assert not torch.equal(wide.weights, narrow.weights)
    assert torch.equal(narrow.weights, of(4, accumulator_dtype="bfloat16").weights)
    off = [float((found.weights - exact.weights).norm()) for found in (wide, narrow)]
    assert off[1] < 1.5 * off[0]


@pytest.mark.parametrize(
    ("dtype", "asked", "words"),
    [
        (torch.float32, "bfloat16", "for parameters of bfloat16"),
        (torch.bfloat16, "float16", 'must be "float32" or "bfloat16"'),
    ],
)
def test_what_could_not_be_summed_so_is_refused_before_training(dtype, asked, words):
    trainer = made(dtype)
    before = dict(vars(trainer))
    with pytest.raises(ValueError, match=words):
        accumulate(trainer, accumulator_dtype=asked)
    assert vars(trainer) == before
