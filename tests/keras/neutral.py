"""Tests that the quick tier leaves out on some backends.

What is the same on every backend is tried on PyTorch alone: there nothing is compiled, and a case
costs a tenth. What a backend does by itself (its loop, its buffers, counted masks, moments,
packing, retry) stays in the quick tier of each. On JAX `run_eagerly` compiles every operation
alone, so there one case of it is enough.
"""

from pathlib import Path

import pytest

REASON = "the same code as on PyTorch, where the quick tier tries it and nothing is compiled"
REASON_ON_JAX = "compiles for half a minute and more; test_modes.py and jax/ try it with less"

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
    "test_first_window.py": {
        "test_no_false_alarm[two outputs]",
        "test_what_adds_up_is_tried_and_passes[one number]",
        "test_what_adds_up_is_tried_and_passes[compute_loss]",
        "test_what_does_not_add_up_is_refused_and_nothing_is_changed[rows]",
        "test_what_does_not_add_up_is_refused_and_nothing_is_changed[compute_loss]",
        "test_what_does_not_add_up_is_refused_and_nothing_is_changed[layer]",
        "test_either_a_wrong_value_or_a_wrong_gradient_is_refused",
        "test_a_mean_over_tokens_is_refused",
        "test_the_check_can_be_turned_off",
        "test_what_is_not_cut_is_not_tried",
        "test_another_loss_is_tried_anew",
        "test_rows_take_their_sample_weights_along",
        "test_a_packed_batch_is_tried_by_its_rows",
        "test_what_cannot_be_tried_is_said_once_and_trained",
        "test_an_error_on_few_rows_is_said_and_trained",
        "test_numbers_of_the_host_cannot_be_tried",
        "test_what_is_keras_own_is_not_tried",
    },
    "test_gather.py": {
        "test_a_coupled_loss_proves_itself_and_is_certified",
        "test_a_noise_scale_is_refused",
        "test_a_plan_is_that_of_the_gathered_step",
        "test_another_loss_is_looked_at_anew",
        "test_memory_that_runs_out_is_asked_for_less",
        "test_moving_averages_take_one_update_per_batch",
        "test_one_microbatch_and_losses_of_rows_are_not_gathered",
        "test_only_outputs_that_need_it_are_gathered",
        "test_what_is_gathered_is_said_once",
        "test_without_gathering_both_kinds_of_loss_are_named",
    },
    "test_gather_detection.py": {
        "test_losses_of_keras",
        "test_the_same_losses_by_their_values",
    },
    "test_limited.py": {
        "test_an_update_that_runs_out_is_that_of_the_smaller_size[forward-fit]",
    },
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
    "test_plan.py": {
        "test_a_generator_loses_no_batch",
        "test_a_limit_is_kept",
        "test_a_plan_of_a_file_is_not_used_under_another_limit",
        "test_another_loss_is_planned_anew",
        "test_plans_of_a_file_are_used",
    },
    "test_recovery.py": {
        "test_a_later_batch_runs_again_with_all_that_came_before",
        "test_it_grows_again_when_asked",
        "test_it_may_run_out_again_and_again",
        "test_a_number_of_micro_batches_is_recovered_too",
        "test_an_ambiguous_error_is_tried_with_less",
        "test_an_ambiguous_error_that_less_does_not_mend_comes_out_as_it_was",
    },
}


# The same on JAX.
SLOW_ON_JAX = {
    "test_batchnorm.py": {
        "test_the_statistics_of_the_first_batchnorm_are_those_of_the_whole_batch[eager]"
    },
    "test_first_window.py": {
        "test_what_does_not_add_up_is_refused_and_nothing_is_changed[added]",
    },
    "test_metrics.py": {"test_equals_keras[stateful, weighted too]"},
    "test_mixed_precision.py": {
        "test_half_variables_agree_to_their_rounding[bfloat16-{'run_eagerly': True}]",
        "test_mixed_policies_take_the_steps_that_keras_takes[mixed_bfloat16-{'run_eagerly': True}]",
    },
    "test_optimizers.py": {
        "test_a_loss_scale_compiled_later_is_read_at_every_window[{'run_eagerly': True}]"
    },
    "test_modes.py": {
        "test_a_model_may_change_its_mind[{'run_eagerly': True}]",
        "test_train_on_batch_eagerly",
    },
    "test_packing.py": {
        "test_equals_keras[eagerly]",
        "test_memory_that_runs_out_halves_the_tokens",
    },
}


def leave_out(items, backend):
    """Marks those of a backend.

    Args:
        items: all tests that were collected.
        backend: the backend under test.

    Raises:
        pytest.UsageError: whole files were collected, and a name is none of their tests.
    """
    if backend != "torch":
        _mark(items, NEUTRAL, REASON)
    if backend == "jax":
        _mark(items, SLOW_ON_JAX, REASON_ON_JAX)


def _mark(items, table, reason):
    for file, names in table.items():
        found = [item for item in items if item.path == Path(__file__).with_name(file)]
        for item in found:
            if {item.name, item.originalname} & names:
                item.add_marker(pytest.mark.thorough(reason))
        known = {name for item in found for name in (item.name, item.originalname)}
        # One test may have been asked for by its name.
        if len(found) > len(names) and (strangers := names - known):
            raise pytest.UsageError(
                f"tests/keras/neutral.py names tests of {file}. Got {sorted(strangers)}, which "
                "are none. Mend the list."
            )
