"""Kinds of models, losses, precisions and trainers, each against its own uncut batch."""

import re

import pytest
import torch
from tests.tiers import tiered
from tests.transformers.losses import ClassWeighted, RowMeans
from tests.transformers.training import (
    HEADS,
    VOCABULARY,
    arguments,
    bert,
    causal_loss,
    collated,
    error,
    loss_error,
    model_of,
    rows_of,
    run,
    trained,
    trainer_of,
    weights_of,
)
from torch.nn import functional
from transformers import BertForMaskedLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from virtualbatch.transformers import accumulate

ONE = {"num_train_epochs": 1}
ROWS = rows_of("tokens", 23)
OURS = {
    "window": (2, 5, {}),
    "cut": (10, 1, {"microbatch_size": 3}),
    "packed": (10, 1, {"microbatch_tokens": 40}),
}


def assert_exact(found, uncut, least=1e-11):
    assert error(found, uncut) < least
    assert loss_error(found, uncut) < least / 10


def ways(head, *, least=1e-11, own=None, names=tuple(OURS), **more):
    """Tries ours against the uncut batch, and that the trainer's own way is off by `own`."""
    given = {"rows": ROWS, **ONE, **more}
    made = given.pop("made", None)

    def one(batch, steps, ours=None):
        return run(head, batch, steps, ours, model=made and made(), **given)

    uncut = one(10, 1)
    for name in names:
        batch, steps, ours = OURS[name]
        assert_exact(one(batch, steps, ours), uncut, least)
    if own is not None:
        assert error(one(2, 5), uncut) > own
    return uncut


@pytest.mark.thorough("the adapter of low rank is checkpointed as well")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_gradient_checkpointing():
    ways("masked", own=0.1, names=("cut",), activation_checkpointing=True)


def test_rows_grouped_by_length():
    ways("masked", own=0.1, names=("packed",), train_sampling_strategy="group_by_length")


@pytest.mark.thorough("the trainer's own count is tried with other losses")
def test_label_smoothing():
    # Transformers computes it in float32.
    ways("llama", least=1e-6, names=("cut",), label_smoothing_factor=0.1)


@pytest.mark.thorough("compiling a model takes seconds")
def test_a_compiled_model():
    ways("masked", names=("cut",), torch_compile=True, torch_compile_backend="eager")


def counted_loss(outputs, labels, num_items_in_batch=None):
    """A sum over the count, without which it cannot do."""
    return causal_loss(outputs.logits, labels, VOCABULARY, int(num_items_in_batch))


def test_a_loss_function_that_needs_a_count():
    ways("llama", names=("window", "cut"), given={"compute_loss_func": counted_loss})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_of_low_rank_with_gradient_checkpointing():
    peft = pytest.importorskip("peft")

    def made():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0)
        model = peft.get_peft_model(model_of("masked"), config)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.double()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    ways("masked", made=made, own=0.1, names=("cut",), activation_checkpointing=True)


@pytest.mark.parametrize("cut", [{}, {"microbatch_tokens": 16}], ids=str)
def test_the_weight_is_found_where_each_batch_is_one_row(cut, caplog):
    given = {"cls": RowMeans, "rows": ROWS, **ONE}
    uncut = run("masked", 10, 1, **given)
    with caplog.at_level("INFO", "virtualbatch"):
        found = run("masked", 1, 10, cut, **given)
    assert_exact(found, uncut)
    assert "is divided by: rows." in caplog.text


def test_a_loss_that_no_weight_puts_together_is_refused_where_each_batch_is_one_row():
    trainer = trainer_of("sequence", 1, 10, cls=ClassWeighted, **ONE)
    with pytest.raises(ValueError, match="A loss must be one mean or sum over rows"):
        accumulate(trainer).train()


def test_a_trainer_for_sequences():
    rows = rows_of("sequence", 23)

    def one(batch, steps, ours=None):
        shared = arguments(batch, steps, **ONE).to_dict()
        args = Seq2SeqTrainingArguments(
            **{
                name: shared[name]
                for name in (
                    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps"),
                    *("num_train_epochs", "learning_rate", "logging_steps", "report_to", "use_cpu"),
                    *("save_strategy", "disable_tqdm", "seed", "data_seed"),
                )
            }
        )
        trainer = Seq2SeqTrainer(
            model=model_of("t5"), args=args, train_dataset=rows, data_collator=collated
        )
        return trained(trainer if ours is None else accumulate(trainer, **ours))

    uncut = one(10, 1)
    assert_exact(one(*OURS["packed"]), uncut)
    assert error(one(2, 5), uncut) > 0.1


class StepsAndLosses(Trainer):
    """Overrides both, as users do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps += 1
        # What it leaves of the inputs is nobody's.
        loss = super().training_step(model, inputs, num_items_in_batch)
        inputs.clear()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()) * 2
        return (loss, outputs) if return_outputs else loss


@pytest.fixture(scope="module")
def own_losses():
    """What it leaves alone, on whole batches."""
    return run("masked", 10, 1, cls=StepsAndLosses, rows=ROWS, **ONE)


@pytest.mark.parametrize("name", OURS)
def test_a_subclass_with_its_own_step_and_loss(name, own_losses):
    batch, steps, ours = OURS[name]
    found = run("masked", batch, steps, ours, cls=StepsAndLosses, rows=ROWS, **ONE)
    assert_exact(found, own_losses)
    # Its step runs as often as it does without us: 12 batches of 2 rows, or 3 of 10.
    assert found.trainer.steps == (12 if steps > 1 else 3)


def test_the_trainer_alone_is_wrong_on_the_loss_of_a_subclass(own_losses):
    assert error(run("masked", 2, 5, cls=StepsAndLosses, rows=ROWS, **ONE), own_losses) > 0.1


class Twice(Trainer):
    """Adversarial training: its step needs the loss twice."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        other = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss + other)
        return (loss + other).detach()


class Never(Trainer):
    """Its step has a loss of its own."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class WithOutputs(Trainer):
    """Its step looks at outputs."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss, _ = self.compute_loss(model, inputs, return_outputs=True)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(
    ("cls", "got"), [(Twice, "2 calls"), (Never, "0 calls"), (WithOutputs, "")]
)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_step_that_needs_more_than_one_loss_is_refused(cls, got, steps):
    trainer = trainer_of("masked", 10 // steps, steps, cls=cls, rows=ROWS, **ONE)
    before = weights_of(trainer.model)
    accumulate(trainer)
    with pytest.raises(ValueError, match="A training_step must call compute_loss once") as raised:
        trainer.train()
    assert re.search(rf"Got {got}.*in {cls.__name__}\.", str(raised.value))
    assert torch.equal(weights_of(trainer.model), before)


def test_hooks_of_parameters_hear_one_gradient_an_update():
    heard = []

    def doubled(gradient):
        heard.append(1)
        return gradient * 2

    def one(batch, steps, ours=None):
        model = model_of("masked")
        for parameter in model.parameters():
            parameter.register_hook(doubled)
        heard.clear()
        found = run("masked", batch, steps, ours, model=model, rows=ROWS, **ONE)
        return found, len(heard) / len(list(model.parameters()))

    (uncut, calls), (found, ours) = one(10, 1), one(*OURS["cut"])
    assert calls == ours == 3
    assert_exact(found, uncut)


class Masks(torch.nn.Dropout):
    """Keeps what it has dropped."""

    def __init__(self):
        super().__init__(0.1)
        self.masks = []

    def forward(self, x):
        found = super().forward(torch.ones_like(x)) if self.training else torch.ones_like(x)
        if self.training:
            self.masks.append(found[0, 0])
        return x * found


def test_masks_of_dropout_differ_between_microbatches():
    model = bert(BertForMaskedLM)
    dropout = model.bert.embeddings.dropout = Masks()
    trainer = trainer_of("masked", 10, 1, model=model, rows=ROWS[:10], **ONE)
    accumulate(trainer, microbatch_size=2).train()
    # The weight was found without it: five micro-batches have one mask each.
    assert len(dropout.masks) == 5
    assert len({tuple(mask.tolist()) for mask in dropout.masks}) > 1
    assert torch.isfinite(weights_of(model)).all()


PRECISIONS = {"autocast": {"bf16": True}, "bfloat16": {}}


@pytest.mark.parametrize(
    "precision", tiered(PRECISIONS, ["autocast"], "the same rounding, of all tensors")
)
def test_low_precision_is_as_far_from_float64_as_the_uncut_batch(precision):
    more = {"learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}
    more |= {"rows": rows_of("tokens", 16), **ONE}

    def model(dtype):
        torch.set_default_dtype(torch.float32)
        made = HEADS["llama"][0]()
        torch.set_default_dtype(torch.float64)
        return made.to(torch.bfloat16 if precision == "bfloat16" else torch.float32).to(dtype)

    narrow = torch.bfloat16 if precision == "bfloat16" else torch.float32

    def moved(dtype, batch, steps, ours=None, **low):
        torch.manual_seed(0)
        made = model(dtype)
        if dtype == torch.float64:
            made.loss_function = causal_loss
        before = weights_of(made)
        return run("llama", batch, steps, ours, model=made, **more, **low).weights - before

    exact = moved(torch.float64, 16, 1)

    def distance(*args):
        return float((moved(narrow, *args, **PRECISIONS[precision]) - exact).norm() / exact.norm())

    uncut = distance(16, 1)
    assert 1e-4 < uncut < 0.1
    assert distance(1, 16, {}) <= 1.2 * uncut
    assert distance(16, 1, {"microbatch_size": 1}) <= 1.2 * uncut
