"""The Hugging Face Trainer on a CUDA device, in half precision. Not measured yet."""

import pytest
import torch
from tests.transformers.training import error, run

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

PLAIN = {"use_cpu": False, "num_train_epochs": 1}


@pytest.mark.parametrize("cut", [{"microbatch_size": 4}, {"microbatch_tokens": 48}])
def test_float32_is_that_of_whole_batches(cut):
    uncut = run("masked", 20, 1, **PLAIN)
    assert error(run("masked", 20, 1, cut, **PLAIN), uncut) < 1e-3
    assert error(run("masked", 4, 5, **PLAIN), uncut) > 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_float32_as_whole_batches_are(precision):
    """With float16 the Trainer's scaler scales what is handed over."""
    exact = run("masked", 20, 1, **PLAIN)
    half = PLAIN | {precision: True}
    uncut, own = run("masked", 20, 1, **half), run("masked", 4, 5, **half)
    found = run("masked", 20, 1, {"microbatch_size": 4}, **half)
    assert error(found, exact) < 1.5 * error(uncut, exact)
    assert error(own, exact) > 2 * error(found, exact)
