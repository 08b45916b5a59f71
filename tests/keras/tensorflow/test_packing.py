"""Packed batches on TensorFlow: one trace for all lengths, and data that is padded differently."""

import pytest
import tensorflow as tf
from tests.keras.packing import IDS, LABELS, LENGTHS, PACKED, counting, length_of, tagger
from tests.keras.problems import compiled, crossentropy
from tests.keras.training import Case, assert_equals_keras

import virtualbatch.keras as vb


@pytest.mark.parametrize(("factor", "text"), [(2, "exceed the padded axis"), (0, "be below 1")])
def test_lengths_that_do_not_fit_are_refused(factor, text):
    model = tagger()
    model.compile("sgd", crossentropy())
    vb.accumulate(model, microbatch_tokens=40, lengths=lambda ids: factor * length_of(ids))
    with pytest.raises(ValueError, match=rf"length.*{text}"):
        model.fit(IDS, LABELS, verbose=0)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"jit_compile": True}, marks=pytest.mark.thorough("another mode of it"))],
    ids=str,
)
def test_one_trace_serves_all_lengths(options):
    model, calls = counting(**options)
    model.fit(IDS[:60], LABELS[:60], batch_size=10, verbose=0, shuffle=False)
    once = list(calls)
    model.fit(IDS[60:120], LABELS[60:120], batch_size=10, epochs=2, verbose=0)
    assert calls == once
    # The mask is counted by one forward more.
    assert once.count((None, None, 4)) <= 2


@pytest.mark.thorough("other data for the same program")
def test_batches_that_are_padded_to_their_own_longest_row():
    def data():
        def rows():
            for ids, labels, length in zip(IDS, LABELS, LENGTHS, strict=True):
                yield ids[:length], labels[:length]

        spec = tf.TensorSpec([None], tf.int64)
        found = tf.data.Dataset.from_generator(rows, output_signature=(spec, spec))
        return found.apply(tf.data.experimental.assert_cardinality(len(IDS))).padded_batch(9)

    case = Case("", tagger, compiled(metrics=[]), data, None, {}, PACKED)
    assert_equals_keras(case)
