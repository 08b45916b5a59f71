"""Tests of what is the same on every backend; the quick tier tries them on PyTorch alone.

There nothing is compiled, and a case costs a tenth. What a backend does by itself (its loop, its
buffers, counted masks, moments, packing, retry) stays in the quick tier of each.
"""

import pytest

REASON = "the same code as on PyTorch, where the quick tier tries it and nothing is compiled"

# File -> functions, or ids of their cases.
NEUTRAL = {
    "test_certify.py": {
        "test_exact[masked token weights]",
        "test_exact[regularisers]",
        "test_wrong_models[stateful-counting/calls-<lambda>]",
        "test_wrong_models[sum_loss-compute_loss of OwnLoss-OwnLoss]",
        "test_wrong_models[non_finite-parameter sequential/dense/kernel-broken]",
        "test_wrong_models[no_gradient-unused/unused/kernel-Unused]",
        "test_wrong_losses_and_metrics[coupled_rows-the loss contrastive_rows-options2]",
        "test_wrong_losses_and_metrics[stateful-metric largest_error-options3]",
        "test_the_cause_is_the_same_from_sketches",
    },
    "test_certify_loop.py": {
        "test_the_option_of_keras_is_a_mean_of_means",
        "test_a_step_at_each_microbatch",
    },
    "test_data.py": {"test_equals_keras[frames]", "test_equals_keras[PyDataset]"},
    "test_losses.py": {
        "test_equals_keras[sum_over_batch_size, row weights]",
        "test_equals_keras[sum_over_batch_size, masks]",
        "test_equals_keras[sum, masks, token weights]",
        "test_equals_keras[mean_with_sample_weight, row weights]",
        "test_equals_keras[values in a matrix]",
        "test_equals_keras[a function of one number, masks, token weights]",
        "test_equals_keras[a __call__ of its own]",
        "test_equals_keras[one number, mean_with_sample_weight, masks, row weights]",
    },
    "test_metrics.py": {"test_equals_keras[MeanIoU, functions]"},
    "test_models.py": {
        "test_equals_keras[add_loss only, no y]",
        "test_equals_keras[subclassed, dict]",
        "test_equals_keras[tied embedding]",
    },
    "test_modes.py": {
        "test_equals_keras[micro-batches larger than the batch]",
        "test_equals_keras[both sizes, a short last batch]",
    },
    "test_optimizers.py": {
        "test_equals_keras[clipvalue]",
        "test_equals_keras[weight decay]",
        "test_equals_keras[constraints]",
    },
    "test_outputs.py": {
        "test_equals_keras[dicts]",
        "test_equals_keras[deeply nested]",
        "test_equals_keras[masks apart, token weights]",
    },
    "test_recovery.py": {
        "test_it_may_run_out_again_and_again",
        "test_a_number_of_micro_batches_is_recovered_too",
        "test_an_ambiguous_error_is_tried_with_less",
        "test_an_ambiguous_error_that_less_does_not_mend_comes_out_as_it_was",
    },
}


def leave_to_torch(items):
    """Marks them on another backend.

    Args:
        items: all tests that were collected.

    Raises:
        pytest.UsageError: a whole file was collected, and a name is none of its tests.
    """
    for file, names in NEUTRAL.items():
        found = [item for item in items if item.path.name == file and "keras" in item.path.parts]
        for item in found:
            if {item.name, item.originalname} & names:
                item.add_marker(pytest.mark.thorough(REASON))
        known = {name for item in found for name in (item.name, item.originalname)}
        if found and len(known) > len(names) and (strangers := names - known):
            raise pytest.UsageError(
                f"tests/keras/neutral.py names tests of {file}. Got {sorted(strangers)}, which "
                "are none. Mend the list."
            )
