"""TRL's trainers: updates and logged metrics of the whole batch, and what is refused of them.

TRL's own output layer computes log-probabilities in float32, whatever the model is: 1e-6 is as near
as two ways to cut a batch come there. Reward training does not use it.
"""

import functools

import pytest
import trl
from tests.tiers import tiered
from tests.transformers.training import error, loss_error
from tests.transformers.trl_training import dpo, grpo, metrics_off, reward, run, sft

FLOAT32 = 1e-6
METRICS = 1e-5
PAIRS = {"window": (2, 5, {}), "cut": (10, 1, {"microbatch_size": 3})}
PACKED = {"packed": (10, 1, {"microbatch_tokens": 48})}
GROUPS = {"window": (3, 4, {}), "cut": (12, 1, {"microbatch_size": 5})}
BOTH = {"window, cut": (3, 4, {"microbatch_size": 2})}
# Name -> (trainer, arguments, uncut batch, rows and steps of its own, how ours are cut).
TABLE = {
    "sft": (sft, {}, 10, (2, 5), PAIRS | PACKED),
    "sft dft": (sft, {"loss_type": "dft"}, 10, (2, 5), PAIRS | PACKED),
    "dpo": (dpo, {}, 10, (2, 5), PAIRS | PACKED),
    "dpo, reference known": (dpo, {"precompute_ref_log_probs": True}, 10, (2, 5), PAIRS),
    "dpo sft": (dpo, {"loss_type": "sft"}, 10, (2, 5), PAIRS | PACKED),
    "reward": (reward, {}, 10, (2, 5), PAIRS | PACKED),
    "reward, centered": (reward, {"center_rewards_coefficient": 0.1}, 10, (2, 5), PAIRS),
    **{
        f"grpo {kind}": (grpo, {"loss_type": kind}, 12, (3, 4), GROUPS | BOTH)
        for kind in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "vespo", "sapo")
    },
    # Two updates by the same completions: importance ratios are clipped in the second.
    "grpo again": (
        grpo,
        {"num_iterations": 2, "epsilon": 0.001, "learning_rate": 0.5},
        12,
        (3, 4),
        GROUPS | BOTH,
    ),
    "grpo again, by sequence": (
        grpo,
        {
            "loss_type": "luspo",
            "num_iterations": 2,
            "epsilon": 0.001,
            "learning_rate": 0.5,
            "importance_sampling_level": "sequence",
        },
        12,
        (3, 4),
        GROUPS | BOTH,
    ),
    "rloo again": (
        grpo,
        {
            "kind": (trl.RLOOTrainer, trl.RLOOConfig),
            "num_iterations": 2,
            "epsilon": 0.001,
            "learning_rate": 0.5,
        },
        12,
        (3, 4),
        GROUPS | BOTH,
    ),
}
# What the trainer's own way is off by at least: its weights, or one of the metrics that it logs.
OWN = {
    "sft": ("mean_token_accuracy", 5e-4),
    "dpo": ("weights", 0.2),
    "dpo, reference known": ("rewards/margins", 0.1),
    "dpo sft": ("weights", 0.1),
    "reward": ("weights", 0.1),
    "reward, centered": ("min_reward", 5e-3),
    "grpo bnpo": ("weights", 0.03),
    "grpo again": ("clip_ratio/low_mean", 0.01),
    "grpo again, by sequence": ("clip_ratio/high_max", 0.1),
    "rloo again": ("entropy", 1e-4),
}
QUICK = {
    *("sft", "dpo", "dpo, reference known", "reward", "grpo dapo", "grpo grpo", "grpo bnpo"),
    *("grpo dr_grpo", "grpo again"),
}


@functools.cache
def uncut(name):
    make, given, batch, _, _ = TABLE[name]
    return run(make, batch, 1, **given)


@pytest.mark.parametrize("name", tiered(TABLE, QUICK, "the same with other losses of TRL"))
def test_an_update_and_its_metrics_are_those_of_the_whole_batch(name):
    make, given, _, _, cuts = TABLE[name]
    whole = uncut(name)
    most = 1e-11 if make is reward else FLOAT32
    for batch, steps, ours in cuts.values():
        found = run(make, batch, steps, ours, **given)
        assert error(found, whole) <= most
        # A logged loss is a metric: of parts that cancel, as those of RLOO do.
        assert loss_error(found, whole) <= (most if make is reward else METRICS)
        off = metrics_off(found, whole)
        assert max(off.values()) <= METRICS, off


@pytest.mark.parametrize("name", tiered(OWN, QUICK & OWN.keys(), "the same with other losses"))
def test_the_trainers_own_way_is_another_update_or_logs_other_metrics(name):
    make, given, _, (batch, steps), _ = TABLE[name]
    own = run(make, batch, steps, **given)
    what, least = OWN[name]
    off = metrics_off(own, uncut(name)) | {"weights": error(own, uncut(name))}
    assert off[what] > least
