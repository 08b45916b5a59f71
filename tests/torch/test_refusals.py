"""Bad input: a clear error, before anything is computed or changed."""

import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

X = torch.ones(6, 2)


class Call:
    """A call that would work, whose arguments can be changed to ones that do not."""

    def __init__(self, **changes):
        self.model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        self.kept = torch.ones(1, 2)
        self.model[1].weight.grad = self.kept
        self.before = copy.deepcopy(self.model.state_dict())
        self.calls = 0
        self.arguments = {
            "loss_fn": self.loss,
            "batch": X,
            "module": self.model,
            "microbatch_size": 2,
        } | changes

    def loss(self, batch):
        self.calls += 1
        x = batch[0] if isinstance(batch, tuple | list) else batch
        return self.model(x).mean()

    def refused(self, error, text, calls=0):
        with pytest.raises(error, match=text):
            vb.backward(**self.arguments)
        assert self.calls == calls
        assert self.model[1].weight.grad is self.kept
        assert (self.kept == 1).all()
        assert self.model[1].bias.grad is None
        assert (self.model[0].momentum, len(self.model[0]._forward_hooks)) == (0.1, 0)
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.before[name]), name


def test_the_call_works_unchanged():
    call = Call()
    vb.backward(**call.arguments)
    assert call.calls == 3


SIZES = {
    "none": ({"microbatch_size": None}, r"A batch needs a size .*Pass microbatch_size="),
    "zero": ({"microbatch_size": 0}, r"microbatch_size must be a positive .* microbatch_size=0\."),
    "negative": ({"microbatch_size": -1}, r"Got microbatch_size=-1\."),
    "fraction": ({"microbatch_size": 2.5}, r"Got microbatch_size=2\.5\."),
    "boolean": ({"microbatch_size": True}, r"Got microbatch_size=True\."),
    "text": ({"microbatch_size": "big"}, r"Got microbatch_size='big'\."),
    "tensor": ({"microbatch_size": torch.tensor(2)}, r"Got microbatch_size=tensor\(2\)\."),
    "no steps": ({"accumulation_steps": 0}, r"accumulation_steps must be a positive integer\."),
    "disagree": (
        {"accumulation_steps": 2},
        r"same cut\. .*for 6 rows / 2 = 3 micro-batches\. Pass only one",
    ),
    "rows differ": (
        {"batch": (X, X[:4])},
        r"same number of rows\. Got 6 rows in batch\[0\] and 4 rows in batch\[1\]\.",
    ),
    "no rows": ({"batch": X[:0]}, r"at least one row\. Got 0 rows in batch\."),
    "scalar": ({"batch": {"x": X, "s": torch.tensor(1)}}, r"Got the scalar batch\['s'\]\."),
    "no batch": ({"batch": None}, r"must hold at least one array\. Got none\."),
    "no array": ({"batch": {"a": None, "b": 3}}, r"must hold at least one array\. Got none\."),
    "wrong axis": ({"batch": (X, torch.ones(3, 6))}, r"Got 6 rows in batch\[0\] and 3 rows"),
    "empty window": (
        {"batch": vb.Window([]), "microbatch_size": None},
        r"must hold at least one micro-batch\. Got an empty Window\.",
    ),
    "window and size": ({"batch": vb.Window([X])}, r"A Window is already cut\. Got microbatch_s"),
    "window and steps": (
        {
            "batch": vb.Window([X]),
            "microbatch_size": None,
            "accumulation_steps": 2,
        },
        r"Got microbatch_size=None and accumulation_steps=2 with a Window\. Leave both out\.",
    ),
    "window of nothing": (
        {"batch": vb.Window([X, None]), "microbatch_size": None},
        r"at least one array\. Got none\.",
    ),
    "no rows in a window": (
        {"batch": vb.Window([X, X[:0]]), "microbatch_size": None},
        r"at least one row\. Got 0 rows in window\[1\]\.",
    ),
    "rows differ in a window": (
        {"batch": vb.Window([(X, X), (X, X[:4])]), "microbatch_size": None},
        r"Got 6 rows in window\[1\]\[0\] and 4 rows in window\[1\]\[1\]\.",
    ),
    "structures": (
        {"batch": vb.Window([{"x": X}, {"y": X}]), "microbatch_size": None},
        r"same structure\. Got microbatch\['x'\] a tensor in window\[0\] and "
        r"microbatch\['y'\] a tensor in window\[1\]\.",
    ),
    "leaves": (
        {"batch": vb.Window([{"x": X, "m": X}, {"x": X, "m": None}]), "microbatch_size": None},
        r"microbatch\['m'\] of type NoneType in window\[1\]\.",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_rows(name):
    changes, text = SIZES[name]
    Call(**changes).refused(ValueError, text)


TYPES = {
    "array": (np.ones((6, 2)), r"tensors of PyTorch\. Got batch of type ndarray\. Pass torch\.as_"),
    "array inside": ([X, np.ones(6)], r"Got batch\[1\] of type ndarray\. Pass torch\.as_tensor\("),
    "sparse": ((X, X.to_sparse()), r"dense\. Got a tensor of layout torch\.sparse_coo in batch\[1"),
    "nested": (
        (X, torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)),
        r"must be dense\. Got a .* in batch\[1\]\. Pass a Window",
    ),
    "object": ((X, object()), r"Got batch\[1\] of type object\. Pass its tensors instead"),
    "packed": (
        (X, nn.utils.rnn.pack_sequence([X[0], X[1]])),
        r"Got batch\[1\] of type PackedSequence\.",
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_batches_of_the_wrong_kind(name):
    batch, text = TYPES[name]
    Call(batch=batch).refused(TypeError, text)


def test_arrays_in_a_window_are_named():
    call = Call(batch=vb.Window([X, X.numpy()]), microbatch_size=None)
    call.refused(TypeError, r"Got window\[1\] of type ndarray")


@pytest.mark.parametrize("name", ["loss_fn", "weight", "backward_fn"])
def test_functions(name):
    of_what = "loss" if name == "backward_fn" else "batch"
    Call(**{name: 3}).refused(TypeError, rf"{name} must be a function of one {of_what}\. Got .*=3")


def frozen():
    return nn.Linear(2, 1).requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (frozen(), ValueError, r"at least one trainable parameter\. Got Linear without any\."),
        ([nn.ReLU(), frozen()], ValueError, r"Got ReLU, Linear without any\."),
        ([], ValueError, r"Got no module without any\."),
        (None, TypeError, r"torch\.nn\.Module or an iterable of them\. Got NoneType\."),
        ([nn.Linear(1, 1), "x"], TypeError, r"Got str\. Pass the model"),
        (nn.LazyLinear(2), ValueError, r"must be initialised\. Got weight without a shape in Lazy"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_modules(module, error, text):
    Call(module=module).refused(error, text)


def test_a_hook_that_may_step_an_optimizer():
    call = Call()
    call.model[1].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    call.refused(
        ValueError, r"no post-accumulate-grad hook.* Got one on bias of Linear\. Remove it"
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients(mode):
    with mode():
        Call().refused(ValueError, r"where PyTorch records gradients\. .*Call it outside\.")


WEIGHTS = {
    "negative": (lambda x: x.sum() - 5, r"0 or more\. Got weight=-1\.0 for micro-batch 0\."),
    "NaN": (lambda x: x.sum() * torch.nan, r"Got weight=nan for micro-batch 0\."),
    "infinite": (lambda x: float("inf"), r"Got weight=inf for micro-batch 0\."),
    "later negative": (
        iter([2.0, -3.0, 2.0]).__next__,
        r"Got weight=-3\.0 for micro-batch 1\. Return what the loss of that micro-batch was",
    ),
    "vector": (lambda x: x.sum(1), r"Got shape \(2,\) for term 'loss'\. Reduce it"),
    "NumPy vector": (lambda x: np.ones(3), r"Got shape \(3,\) for term 'loss'\."),
    "vector of a term": (lambda x: {"a": torch.ones(2)}, r"Got shape \(2,\) for term 'a'\."),
    "list": (lambda x: [1, 2], r"Got \[1, 2\] for term 'loss'\."),
    "None": (lambda x: None, r"one number per micro-batch and term\. Got None for term 'loss'"),
    "text": (lambda x: "3", r"Got '3' for term 'loss'"),
    "unsteady": (
        iter([{"a": 1}, {"b": 1}, {"b": 1}]).__next__,
        r"same terms for every micro-batch.* Return 0\.0",
    ),
    "None later": (
        iter([{"a": 1}, {"a": None}, {"a": 1}]).__next__,
        r"None for the same ones\. Got .* and later .*Return 0\.0",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    weight, text = WEIGHTS[name]
    in_turn = not isinstance(weight, types.FunctionType)
    call = Call(weight=(lambda x: weight()) if in_turn else weight)
    call.refused(ValueError, text)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (lambda b: {"a": 1}, r"Got loss terms \['a', 'b'\] and weight terms \['a'\]\."),
        (lambda b: {"a": 1, "c": 1}, r"and weight terms \['a', 'c'\]\. Return one weight"),
        (lambda b: 1, r"and weight terms \['loss'\]\."),
        (lambda b: {}, r"and weight terms \[\]\."),
    ],
)
def test_weights_of_other_terms(weight, text):
    call = Call(weight=weight)
    call.arguments["loss_fn"] = lambda x: {"a": call.loss(x), "b": call.model[1].bias.sum()}
    call.refused(ValueError, text, calls=1)


def test_weights_of_terms_for_a_loss_without_terms():
    Call(weight=lambda batch: {"a": 1}).refused(
        ValueError, r"Got loss terms \['loss'\] and weight terms \['a'\]\.", calls=1
    )


LOSSES = {
    "vector": (lambda m: m(X)[:, 0], ValueError, r"scalar mean\. Got loss_fn\(batch\) with shape"),
    "one row": (lambda m: m(X)[0], ValueError, r"with shape \(1,\)\. Reduce it to one number"),
    "one in a list": (lambda m: [m(X).mean()], TypeError, r"Got loss_fn\(batch\) of type list"),
    "nothing": (lambda m: None, TypeError, r"of type NoneType"),
    "term of rows": (
        lambda m: {"a": m(X).mean(), "b": m(X)[:, 0]},
        ValueError,
        r"Got loss_fn\(batch\)\['b'\] with shape \(6,\)",
    ),
    "boolean": (lambda m: m(X).mean() > 0, TypeError, r"a floating dtype\. Got bool\."),
    "complex": (
        lambda m: m(X).mean() * 1j,
        TypeError,
        r"a floating dtype\. Got complex64\. Cast what it is computed from to a float",
    ),
    "number": (lambda m: 3.0, TypeError, r"must be a scalar tensor.* Got loss_fn\(batch\) of type"),
    "NumPy": (lambda m: np.float32(3), TypeError, r"must be a tensor of PyTorch\. Got float32\."),
    "pair": (lambda m: (m(X).mean(), 1), TypeError, r"of type tuple\. .*pass has_aux=True"),
    "empty": (lambda m: {}, ValueError, r"at least one term\. Got an empty dict\."),
    "integer": (lambda m: torch.tensor(3), TypeError, r"a floating dtype\. Got int64\. Cast"),
    "detached": (
        lambda m: m(X).mean().detach(),
        ValueError,
        r"must depend on a trainable parameter\. Got one without a gradient\. .*detach",
    ),
    "constant": (lambda m: torch.tensor(1.0), ValueError, r"without a gradient\."),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_no_mean(name):
    result, error, text = LOSSES[name]
    call = Call()
    call.arguments["loss_fn"] = lambda batch: result(call.model)
    call.refused(error, text)


@pytest.mark.parametrize(
    ("result", "got"), [(lambda loss: loss, "Tensor"), (lambda loss: (loss, 1, 2), "tuple")]
)
def test_aux_without_a_pair(result, got):
    call = Call(has_aux=True)
    call.arguments["loss_fn"] = lambda batch: result(call.loss(batch))
    call.refused(TypeError, rf"must return \(loss, aux\)\. Got {got}\. Return a pair", calls=1)


def test_an_automatic_size_with_a_number_of_micro_batches():
    Call(microbatch_size="auto", accumulation_steps=2).refused(ValueError, "Leave one of them out")


# Loops of others that accumulate themselves. They need not be installed: what is looked up is
# what Accelerate 1.15.0, Transformers 5.23.0 and Lightning 2.6.6 keep.

ACCELERATE = {
    "unused": ({}, None),
    "ours": ({"plugin_kwargs": {"num_steps": 1}, "sync_gradients": True}, None),
    "accumulating": (
        {"plugin_kwargs": {"num_steps": 4}, "sync_gradients": True},
        r"Accelerate must leave accumulation .*gradient_accumulation_steps=4 in its GradientState",
    ),
    "Trainer of Hugging Face": (
        {"plugin_kwargs": {"num_steps": 1}, "sync_gradients": False},
        r"the Hugging Face Trainer must leave .*Got a call while they accumulate: "
        r"sync_gradients=False.*Train with g",
    ),
}


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_that_accumulates_itself(name, monkeypatch):
    shared, text = ACCELERATE[name]
    state = types.ModuleType("accelerate.state")
    state.GradientState = type("GradientState", (), {"_shared_state": shared})
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    call = Call()
    if text:
        call.refused(ValueError, text)
    else:
        vb.backward(**call.arguments)


@pytest.mark.parametrize("steps", [4, 1])
def test_a_lightning_trainer_that_accumulates_itself(steps):
    call = Call()
    # A LightningModule keeps its trainer in this attribute.
    call.model._trainer = types.SimpleNamespace(accumulate_grad_batches=steps)
    call.arguments["module"] = nn.ModuleList([call.model])
    if steps == 4:
        call.refused(ValueError, r"Got a trainer with accumulate_grad_batches=4\. Make the Trainer")
    else:
        vb.backward(**call.arguments)


@pytest.mark.parametrize(("automatic", "is_training"), [(True, True), (True, False), (False, True)])
def test_a_lightning_module_whose_trainer_calls_backward_itself(automatic, is_training):
    call = Call()
    call.model._trainer = types.SimpleNamespace(accumulate_grad_batches=1, training=is_training)
    call.model._automatic_optimization = automatic
    if automatic and is_training:
        call.refused(ValueError, r"automatic optimization.* Return virtualbatch\.torch\.loss\(")
        # Behind a node the backward pass may be that of the trainer.
        vb.loss(**call.arguments).backward()
    else:
        vb.backward(**call.arguments)
