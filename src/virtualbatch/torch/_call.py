"""One call of `backward` or `loss`: checked, cut, proved and run, alone or with other ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from virtualbatch.torch._batch import ReadBatch, read, read_without_rows
from virtualbatch.torch._certify.first_window import prove_first_window, tell_untried
from virtualbatch.torch._checks import check_call, refuse_foreign_accumulation
from virtualbatch.torch._conclusion import Conclusion, Ran
from virtualbatch.torch._coupled import refused_if_coupled
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._loss import WindowLoss
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._not_finite import Heard
from virtualbatch.torch._remembered import remembered
from virtualbatch.torch._replicas.replicas import Outcome, Replicas
from virtualbatch.torch._window import Program
from virtualbatch.window.not_finite import rows_in_order
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import SINGLE
from virtualbatch.window.window import refuse_sorted_rows

Trained: TypeAlias = torch.nn.Module | torch.Tensor


class Call(NamedTuple):
    """The arguments of one call.

    Fields:
        program: functions and modules.
        batch: a batch or a Window.
        microbatch_size: as given.
        accumulation_steps: as given.
        check: whether the first window of a loss is proved.
    """

    program: Program
    batch: Any
    microbatch_size: Any
    accumulation_steps: Any
    check: bool

    def alone(self, conclude: Conclusion) -> Any:
        """Runs the window in this process.

        Args:
            conclude: what becomes of it.
        """
        batch = self.read()
        program = self.program

        loss = WindowLoss()

        def run(cut: Sequence[Microbatch]) -> Any:
            nonlocal loss
            shares, loss = program.shares(cut), WindowLoss()
            return program.run(self.proved(batch, cut, shares), shares, conclude, loss)

        with refused_if_coupled() as refuse:
            result = self.fit(batch).run(run, refuse=refuse)
        if loss.total is None:
            # Captured graphs ran, and they report no losses of micro-batches.
            self._hear(Heard(result, [(0, SINGLE, result)], [None]))
        else:
            self._hear(Heard(loss.total, loss.parts, rows_in_order(self.batch, loss.rows)))
        return result

    def together(self, replicas: Replicas) -> tuple[Ran, Outcome]:
        """Runs the rows of this rank in the window of all ranks, with `run_window`."""
        # Imported here, so that a process without other ranks does not import it.
        from virtualbatch.torch._replicas.window import run_window

        program = self.program._replace(averaged_over=replicas.size, holds_last=replicas.overlaps)
        call = self._replace(program=program)
        prove = call.proved if replicas.can_run_alone else call.untried
        ran, outcome = run_window(replicas, program, call.read_if_any, call.fit, prove)
        # Each rank reports its own rows, and it may have none.
        if ran.loss.total is not None:
            rows = rows_in_order(self.batch, ran.loss.rows)
            self._hear(Heard(ran.loss.total, ran.loss.parts, rows))
        return ran, outcome

    def _hear(self, losses: Heard) -> None:
        """Receives the losses of a window. Losses of an evaluation are skipped."""
        if torch.is_grad_enabled():
            remembered(self.program.found.owner).losses.take(losses)

    def read_if_any(self) -> ReadBatch:
        """The batch of a rank, which may have no rows."""
        return read_without_rows(self.batch) or self.read()

    def read(self) -> ReadBatch:
        """Reads the batch, and refuses all that can be refused before it runs."""
        program = self.program
        functions = {
            "loss_fn": program.loss_fn,
            "weight": program.weight,
            "backward_fn": program.backward_fn,
        }
        check_call(functions, self.batch, self.microbatch_size, self.accumulation_steps)
        refuse_sorted_rows(self.batch, program.stats)
        refuse_foreign_accumulation()
        return read(self.batch, weighted=program.weight is not None)

    def fit(self, batch: ReadBatch) -> Fit:
        """How the batch is cut."""
        return Fit(self.program, batch, self.microbatch_size, self.accumulation_steps)

    def proved(
        self, batch: ReadBatch, cut: Sequence[Microbatch], shares: Shares
    ) -> Sequence[Microbatch]:
        """Proves the first window of a loss, and returns the micro-batches to run."""
        batch.refuse_graphs(len(cut))
        is_trained = bool(self.program.found.parameters)
        if not (self.check and cut and is_trained) or torch.is_inference_mode_enabled():
            return cut
        with torch.enable_grad():
            return prove_first_window(self.program, batch, cut, shares)

    def untried(
        self, batch: ReadBatch, cut: Sequence[Microbatch], shares: Shares
    ) -> Sequence[Microbatch]:
        """Returns the micro-batches to run, and logs once that their loss was not proved.

        For a window in which no rank can run alone.
        """
        del shares
        batch.refuse_graphs(len(cut))
        if self.check:
            tell_untried(self.program)
        return cut
