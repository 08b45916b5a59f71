"""TRL's trainers where an accumulation that does not look is wrong, and what is refused of them."""

import copy
from contextlib import contextmanager

import pytest
import torch
import trl
from datasets import Dataset
from tests.transformers.training import error, trained
from tests.transformers.trl_training import (
    Text,
    arguments,
    dpo,
    grpo,
    lengths,
    llama,
    metrics_off,
    run,
    sft,
    tokenizer,
)

from virtualbatch.transformers import accumulate

FLOAT32 = 1e-6
METRICS = 1e-5


class FirstEqual:
    """Rewards that are equal in the first update: its advantages and gradients are 0."""

    __name__ = "first_equal"

    def __init__(self):
        self._calls = 0

    def __call__(self, completions, **_):
        self._calls += 1
        return [1.0] * len(completions) if self._calls == 1 else lengths(completions)


@pytest.mark.parametrize("kind", ["dapo", "bnpo"])
def test_a_first_update_without_a_gradient_decides_nothing(kind):
    """In it each weight fits, and that of rows comes first: dapo's sum would become a mean."""

    def make(batch, steps):
        return grpo(batch, steps, rewards=FirstEqual(), loss_type=kind)

    whole = run(make, 12, 1)
    assert whole.logs[0]["frac_reward_zero_std"] == 1
    found = run(make, 3, 4, {"microbatch_size": 2})
    assert error(found, whole) <= FLOAT32
    assert max(metrics_off(found, whole).values()) <= METRICS


def test_a_weight_is_tried_on_rows_of_several_batches_where_each_has_one():
    """One row shows nothing: pairs come first, which the tokens of chosen completions are not."""
    whole = run(dpo, 10, 1, loss_type="sft")
    assert error(run(dpo, 1, 10, {}, loss_type="sft"), whole) <= FLOAT32


@pytest.mark.thorough("the same with completions")
def test_one_row_a_batch_is_the_whole_batch_as_well():
    whole = run(grpo, 12, 1, loss_type="bnpo")
    found = run(grpo, 1, 12, {}, loss_type="bnpo")
    assert error(found, whole) <= FLOAT32
    assert max(metrics_off(found, whole).values()) <= METRICS


def test_batches_that_were_generated_apart_are_joined_where_their_prompts_end():
    """Their prompts differ in width, and are padded on the left: else completions move away."""
    given = {"steps_per_generation": 1, "loss_type": "grpo", "max_completion_length": 1}
    given["learning_rate"] = 0.5
    own = run(grpo, 4, 2, **given)
    for size in (2, 5):
        assert error(run(grpo, 4, 2, {"microbatch_size": size}, **given), own) <= FLOAT32


def test_batches_that_were_generated_apart_have_their_own_counts_of_tokens():
    """What each divides by differs: as they are they are exact, and a cut would mix them."""
    given = {"steps_per_generation": 1, "loss_type": "dapo"}
    own = run(grpo, 4, 2, **given)
    assert error(run(grpo, 4, 2, {}, **given), own) <= FLOAT32
    with pytest.raises(ValueError, match=r"num_items_in_batch=\d+ in one and .*=\d+ in another"):
        run(grpo, 4, 2, {"microbatch_size": 3}, **given)


class Failing(trl.SFTTrainer):
    """Has no memory for more than three rows once; metrics of the failed attempt were appended."""

    calls = 0
    failures = 0

    def compute_loss(self, model, inputs, **given):
        self.calls += 1
        self._metrics["train"]["calls"].append(1.0)
        found = super().compute_loss(model, inputs, **given)
        # Of what the class has, not the instance: that is put back.
        if self.model.training and self.state.global_step and len(inputs["input_ids"]) > 3:
            type(self).failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return found


def failing(batch, steps, **more):
    return Failing(
        model=llama(),
        args=arguments(trl.SFTConfig, batch, steps, max_length=64, **more),
        train_dataset=Text(5).rows(24, prompt=7, completion=9),
        processing_class=tokenizer(),
    )


def plain(batch, steps, **more):
    return sft(batch, steps, rows=24, **more)


def test_an_attempt_that_ran_out_of_memory_is_counted_nowhere():
    whole = run(plain, 12, 1)
    Failing.failures = 0
    found = run(failing, 12, 1, {"microbatch_size": 6})
    assert Failing.failures == 1
    # 6 and 6, then four times 3; neither the failed 6 nor the trial of weights.
    assert found.trainer.calls == 6
    assert [log.pop("calls") for log in found.logs] == [1.0, 1.0]
    assert error(found, whole) <= FLOAT32
    assert max(metrics_off(found, whole).values()) <= METRICS
    assert found.trainer._total_train_tokens == whole.trainer._total_train_tokens


def test_a_window_counts_as_one_call_where_a_log_averages_several():
    """Updates of 10 and 10 rows in one log: not 5 and 5 entries, of which ours would be 4 and 4."""
    whole = run(sft, 10, 1, logging_steps=2)
    found = run(sft, 10, 1, {"microbatch_size": 3}, logging_steps=2)
    assert max(metrics_off(found, whole).values()) <= METRICS


class Sometimes(trl.SFTTrainer):
    """Logs a number of its own, in every other call."""

    seen = 0

    def compute_loss(self, model, inputs, **given):
        self.seen += 1
        if self.seen % 2:
            self._metrics["train"]["mine"].append(torch.tensor(float(self.seen)))
        return super().compute_loss(model, inputs, **given)


def test_a_metric_that_some_calls_append_has_one_entry_for_a_window():
    trainer = Sometimes(
        model=llama(),
        args=arguments(trl.SFTConfig, 12, 1, max_length=64, logging_steps=2),
        train_dataset=Text(5).rows(24, prompt=7, completion=9),
        processing_class=tokenizer(),
    )
    accumulate(trainer, microbatch_size=4)
    # Calls 1 and 3, then 5: means of 2 and 5.
    assert float(trained(trainer).logs[0]["mine"]) == pytest.approx(3.5)


def test_padding_free_batches_are_taken_as_they_are():
    given = {"padding_free": True, "max_length": None}
    assert error(run(sft, 2, 5, {}, **given), run(sft, 10, 1, **given)) <= FLOAT32
    with pytest.raises(ValueError, match="Got cu_seq_lens_q with 3 entries for 1 rows"):
        run(sft, 2, 5, {"microbatch_size": 3}, **given)


def test_what_a_forward_keeps_goes_through_the_trainers_own_context():
    """As with activation_offloading, which needs a device: one saves tensors, ten steps enter."""
    seen = []

    def packed(tensor):
        seen.append("kept")
        return tensor.clone()

    @contextmanager
    def offloaded():
        seen.append("entered")
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            yield

    class Reused:
        """One object that is entered in each step, as TRL's is."""

        def __enter__(self):
            self._inside = offloaded()
            self._inside.__enter__()

        def __exit__(self, *error):
            self._inside.__exit__(*error)

    whole = run(dpo, 10, 1)
    trainer = dpo(2, 5)
    trainer.maybe_activation_offload_context = Reused()
    accumulate(trainer, microbatch_size=3)
    found = trained(trainer)
    assert seen.count("entered") == 12
    assert seen.count("kept") > 100
    assert error(found, whole) <= FLOAT32


def refusal(make, *args, **given):
    """What `accumulate` or the first update says, and that nothing was trained."""
    ours = given.pop("ours", {})
    trainer = make(*args, **given)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"Got") as refused:
        accumulate(trainer, **ours).train()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(refused.value)


def kto(batch, steps):
    rows = Text(8).rows(8, prompt=5, completion=8).to_list()
    rows = [row | {"label": bool(number % 2)} for number, row in enumerate(rows)]
    return trl.KTOTrainer(
        model=llama(),
        ref_model=llama(),
        args=arguments(trl.KTOConfig, batch, steps, max_length=64),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def test_losses_that_compare_rows_are_refused_by_name():
    assert "KTOTrainer compares each row with the batch's mean KL" in refusal(kto, 4, 2)
    assert "This loss sorts the rows of a batch" in refusal(dpo, 2, 5, loss_type=["aot"])
    entropy = {"use_adaptive_entropy": True, "loss_type": "bnpo"}
    assert "changes its own coefficient" in refusal(grpo, 3, 4, **entropy)
    assert "tokens of highest entropy" in refusal(grpo, 3, 4, top_entropy_quantile=0.5)


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (dpo, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        pytest.param(
            *(grpo, {"loss_type": "dapo", "entropy_coef": 0.1}),
            marks=pytest.mark.thorough("the same with the entropy bonus of another trainer"),
        ),
    ],
)
def test_two_means_are_refused_by_their_gradients(make, given):
    assert "it is a sum of two means" in refusal(make, 12, 1, ours={"microbatch_size": 3}, **given)


def test_what_grpo_generates_is_not_packed():
    said = refusal(grpo, 3, 4, ours={"microbatch_tokens": 64})
    assert said.startswith("Packing needs attention_mask, padding on the right")
    assert "Got inputs prompt_ids" in said
    assert said.endswith("Pass microbatch_size instead.")


def test_trl_on_several_processes_is_refused(monkeypatch):
    """Its losses gather metrics, which would wait for ranks that have no such micro-batch."""
    trainer = sft(2, 5)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="A trainer of TRL on several processes is not supported"):
        accumulate(trainer)
