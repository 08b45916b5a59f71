"""Plans for Keras on PyTorch: runs whole updates on the batch and undoes each."""

import time
from typing import Any

import keras

from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._gather.gathering import Found, Gathering
from virtualbatch.keras._not_finite import without_losses
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.keras._torch.batch import window_of
from virtualbatch.keras._torch.device import place
from virtualbatch.keras._torch.state import State
from virtualbatch.plan import planner
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.planner import bytes_allowed
from virtualbatch.plan.retry import Memory
from virtualbatch.plan.timing import Timing
from virtualbatch.torch._plan.memory import ERRORS, left_bytes
from virtualbatch.torch._plan.peak import peak_bytes
from virtualbatch.torch._random import RandomState
from virtualbatch.window.cut import even_cut
from virtualbatch.window.tree import array_leaves, common_rows

MEMORY = Memory(ERRORS, lambda: left_bytes(place()))


def planned(model: keras.Model, batch: Any, memory_limit: int | str | None, found: Found) -> Plan:
    """The plan for a batch.

    Args:
        model: a model that is built and compiled, its optimizer too.
        batch: (x, y, sample_weight).
        memory_limit: bytes, a text, or None.
        found: the losses that need all rows and get them.
    """
    rows = common_rows(array_leaves(batch))
    if rows is None:
        raise ValueError("internal: a batch of PyTorch has no number of rows.")
    snapshot = Snapshot(model)
    held = snapshot.nbytes() + sum(array.nbytes for _, array in array_leaves(batch))
    return planner.planned(
        lambda size: _Update(model, batch, rows, size, snapshot, found.gathering),
        rows,
        held,
        bytes_allowed(memory_limit, held, MEMORY),
        ERRORS,
        remainder=True,
    )


class _Update:
    """An update with one micro-batch size."""

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        rows: int,
        size: int,
        snapshot: Snapshot,
        gathering: Gathering | None,
    ):
        self._model, self._batch, self._rows = model, batch, rows
        self._cut = even_cut(rows, size)
        self._added = AddedLosses()
        self._snapshot, self._gathering = snapshot, gathering
        self._peak: list[int] = []
        self.timing = Timing(self._timed)

    def peak_bytes(self) -> int:
        if not self._peak:
            self._taken_back(lambda: self._peak.append(peak_bytes(self._run)))
        return self._peak[0]

    def _timed(self) -> float:
        start = time.perf_counter()
        seconds: list[float] = []

        def run() -> None:
            self._run()
            seconds.append(time.perf_counter() - start)

        self._taken_back(run)
        return seconds[0]

    def _run(self) -> None:
        model = self._model
        if len(self._cut) == 1:
            logs = type(model).train_step(model, self._batch)
        else:
            window = window_of(
                *(model, self._batch, self._rows, self._cut, self._added, False),
                self._gathering,
            )
            logs = without_losses(window.train())
        # Reading a value waits until the device has finished.
        keras.tree.map_structure(float, logs)

    def _taken_back(self, run: Any) -> None:
        random, state = RandomState(place()), State(self._model)
        try:
            run()
        finally:
            state.restore()
            self._snapshot.restore()
            random.restore()
