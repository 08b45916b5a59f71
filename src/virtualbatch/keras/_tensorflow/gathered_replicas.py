"""One batch of `fit` whose losses see the rows of all replicas of a `tf.distribute` strategy.

After the first pass, each replica gets the predictions of all replicas and computes Keras' own loss
of all rows. Its second pass takes the gradients of its own rows. The results are summed over
replicas.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._added_losses import AddedLosses
from virtualbatch.keras._gather.gathering import Gathering
from virtualbatch.keras._not_finite import NO_PLACE
from virtualbatch.keras._tensorflow.cut import Cut
from virtualbatch.keras._tensorflow.gathered_results import Backwards, Forwards
from virtualbatch.keras._tensorflow.gathered_window import GatheredRun
from virtualbatch.keras._tensorflow.packing import PackedCut
from virtualbatch.keras._tensorflow.replicas import (
    ReplicaModel,
    gradient_specs,
    open_rows,
    summed_window_gradients,
    summed_with_moments,
    without_a_sum,
)
from virtualbatch.keras._tensorflow.rows_of_replicas import RowsOfReplicas
from virtualbatch.tensorflow._loop import Traced
from virtualbatch.tensorflow._replicas import replica, summed, unless_empty, with_a_row


class GatheredReplicaRun(GatheredRun):
    """One replica's part of a batch whose losses see all rows.

    Args:
        model: a compiled model.
        batch: (x, y, sample_weight) of this replica's rows; one filler row if it has none.
        cut: the batch, cut.
        everywhere: the number of rows on each replica, an int32 vector.
        added: what is known about the losses that layers add.
        gathering: whose predictions are gathered.
    """

    def __init__(
        self,
        model: keras.Model,
        batch: Any,
        cut: Cut | PackedCut,
        everywhere: Any,
        added: AddedLosses,
        gathering: Gathering,
    ):
        self._rows = RowsOfReplicas(everywhere)
        count, here = self._rows.count, self._rows.here
        super().__init__(model, batch, cut, count, added, gathering)
        self._window = ReplicaModel(model, count, added, here, gathering)

    def _optimizer(self) -> Any:
        return without_a_sum(self._model.optimizer)

    def _one_entry_per_row(self, arrays: Sequence[Any]) -> list[Any]:
        # `of_all` checks this on all replicas. A replica that raised alone would leave the others
        # waiting.
        return []

    def first_pass(self, traced: Sequence[Traced]) -> Forwards:
        """See `GatheredRun`. The results are summed or joined over all replicas."""
        (moments, added, counts, _), arrays, told = traced[0].outputs
        batch = self._read_by_losses()
        like = Forwards(moments, added, counts, list(map(open_rows, arrays)), None, told)
        run = partial(super().first_pass, traced)
        found = unless_empty(self._rows.here, lambda: run()._replace(batch=None), like)
        sums, moments = summed_with_moments(
            [*found.added, *found.counts],
            found.moments,
            [self._start[id(layer)][0] for layer in self._called],
        )
        count = len(found.arrays)
        leaves = [None if x is None else x[: self._rows.here] for x in tf.nest.flatten(batch)]
        of_all = self._rows.of_all([*found.arrays, *leaves])
        return Forwards(
            moments,
            sums[: len(added)],
            sums[len(added) :],
            of_all[:count],
            tf.nest.pack_sequence_as(batch, of_all[count:]),
            # A table of one replica's micro-batches shows nothing about the others. So it is left
            # out, and only the loss of all rows is reported.
            tf.constant([[0.0, NO_PLACE]]),
        )

    def own_rows(self, array: Any) -> Any:
        """See `GatheredRun`; one filler row if there are none."""
        return with_a_row(self._rows.own(super().own_rows(array)), self._rows.here)

    def sums_of_second_pass(self, traced: Sequence[Traced], own: Sequence[Any]) -> Backwards:
        """See `GatheredRun`. The results are summed over all replicas."""
        variables = self._model.trainable_variables
        losses, dense, latest, sparse = traced[0].outputs
        dense, sparse = gradient_specs(dense, sparse, variables)
        like = Backwards(losses, dense, latest, sparse, [])
        run = partial(super().sums_of_second_pass, traced, own)
        found = unless_empty(self._rows.here, lambda: run()._replace(own=[]), like)
        dense, sparse = summed_window_gradients(found.dense, found.sparse, variables)
        # Every replica has computed the same numbers here, so only the first one adds its own.
        mine = [
            tf.convert_to_tensor(x) if replica() == 0 else tf.zeros_like(tf.convert_to_tensor(x))
            for x in own
            if x is not None
        ]
        sums = summed([*found.losses, *mine])
        given = iter(sums[len(found.losses) :])
        return Backwards(
            sums[: len(found.losses)],
            dense,
            found.latest,
            sparse,
            [None if x is None else next(given) for x in own],
        )

    def _read_by_losses(self) -> Any:
        """The batch, without its inputs if no loss or metric reads them."""
        x, y, sample_weight = self._batch
        return (x if self._window.reads_inputs else None), y, sample_weight
