"""What `replicas.py` trains: one batch, of which each rank has a part."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb
from virtualbatch.bench.case import CLASSES, LENGTH, WORDS, Case
from virtualbatch.bench.torch_models import Problem, problem

# Valid tokens of the micro-batches, two a rank.
TOKENS = (3, 8, 20, 21)
_ROWS = 4


@dataclass
class Part:
    """The part of one rank.

    Args:
        case: its micro-batches, for trainers that ask for numbers.
        own: its problem, whose batch is that of all ranks.
        ddp: the model.
    """

    case: Case
    own: Problem
    ddp: DistributedDataParallel

    @property
    def window(self) -> vb.Window:
        """The micro-batches of this rank."""
        return vb.Window(self.own.pieces)

    def loss(self, batch: Any) -> torch.Tensor:
        """Mean loss of some rows, through the module that adds gradients up."""
        return self.own.loss(self.ddp, batch)


def part_of(case: Case, whole: Problem) -> Part:
    """The part of this rank.

    Args:
        case: of a rank.
        whole: the problem of all ranks.
    """
    first = distributed.get_rank() * case.accumulation_steps
    own = whole._replace(
        optimizer=torch.optim.SGD(whole.model.parameters(), 1e-2),
        pieces=whole.pieces[first : first + case.accumulation_steps],
    )
    return Part(case, own, DistributedDataParallel(own.model))


def mlp(scale: int) -> Part:
    """8 micro-batches of 32 rows on each rank."""
    case = Case("torch", "MLP", scale=scale)
    steps = case.accumulation_steps * distributed.get_world_size()
    return part_of(case, problem(Case("torch", "MLP", accumulation_steps=steps, scale=scale)))


def tokens() -> Part:
    """Two micro-batches of four rows on each of two ranks, with few and with many valid tokens."""
    case = Case("torch", "tokens", microbatch_size=_ROWS, accumulation_steps=2)
    whole = problem(case)
    rows = torch.arange(_ROWS)
    lengths = torch.cat([count // _ROWS + (rows < count % _ROWS) for count in TOKENS])
    ids = torch.randint(1, WORDS, (len(lengths), LENGTH)) * (
        torch.arange(LENGTH) < lengths[:, None]
    )
    batch = ids, torch.randint(0, CLASSES, ids.shape)
    pieces = list(zip(*(leaf.split(_ROWS) for leaf in batch), strict=True))
    return part_of(case, whole._replace(model=whole.model.double(), batch=batch, pieces=pieces))
