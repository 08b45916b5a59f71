"""Packed batches on PyTorch: lengths are read, so wrong ones are refused."""

import pytest
from tests.keras.packing import IDS, LABELS, length_of, tagger
from tests.keras.problems import crossentropy

import virtualbatch.keras as vb


@pytest.mark.parametrize(("factor", "text"), [(2, "exceed the padded axis"), (0, "at least 1")])
def test_lengths_that_do_not_fit_are_refused(factor, text):
    model = tagger()
    model.compile("sgd", crossentropy())
    vb.accumulate(model, microbatch_tokens=40, lengths=lambda ids: factor * length_of(ids))
    with pytest.raises(ValueError, match=rf"length.*{text}"):
        model.fit(IDS, LABELS, verbose=0)
