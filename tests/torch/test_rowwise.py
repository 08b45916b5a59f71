"""`rowwise`: the gradients of what it wraps are those of the uncut batch, and state moves once."""

import dataclasses

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.coupled import (
    ROWS,
    by_rowwise,
    contrastive,
    in_one_graph,
    network,
    rows,
    taken,
    uncut,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb
from virtualbatch import pack
from virtualbatch.torch._batch import read
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._rowwise.inputs import Inputs


@dataclasses.dataclass
class Encoded:
    z: torch.Tensor
    label: torch.Tensor
    nothing: None = None


@pytest.mark.parametrize("size", [1, 4, 12, 13, 20])
def test_rows_and_shared_tensors_get_their_gradients(size):
    module, x = network(), rows().requires_grad_()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    contrastive(module(x * scale.exp())).backward()
    due = taken(module, x, scale)
    encode = vb.rowwise(
        lambda x, scale: module(x * scale.exp()), module=module, microbatch_size=size
    )
    contrastive(encode(x, scale)).backward()
    assert_all_close(taken(module, x, scale), due)


def test_chained_functions_and_the_loss_in_blocks():
    module, x = network(), rows()
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def of_rows(batch, others, scale):
        z, label = batch
        return F.cross_entropy(scale.exp() * z @ others.T, label, reduction="none")

    def loss(first, second, block):
        z = F.normalize(second(first(x)), dim=1)
        return block((z, torch.arange(ROWS)), z.roll(1, 0), scale).mean()

    loss(module[:2], module[2], of_rows).backward()
    due = taken(module, scale)
    first = vb.rowwise(module[:2], microbatch_size=4)
    second = vb.rowwise(module[2], microbatch_size=3)
    for size in (1, 5, 20):
        loss(first, second, vb.rowwise(of_rows, microbatch_size=size)).backward()
        assert_all_close(taken(module, scale), due)


@pytest.mark.parametrize("module", [None, []])
def test_a_function_of_its_arguments_alone_needs_no_module(module):
    x = rows()
    weight = torch.randn(x.shape[1], 2, dtype=torch.float64, requires_grad=True)
    scored = vb.rowwise(lambda x, weight: x @ weight, module=module, microbatch_size=4)
    (found,) = torch.autograd.grad(scored(x, weight).var(), weight)
    (due,) = torch.autograd.grad((x @ weight).var(), weight)
    assert_close(found, due)


def test_outputs_keep_their_structure_and_have_no_graph_where_there_is_none():
    module, x = network(), rows()
    due = uncut(module, x)

    def encode(x):
        # The second embedding is one that the loss does not use.
        return [Encoded(module(x), x[:, 0] > 0), {"unused": module(x), "rows": x}]

    encoded, others = vb.rowwise(encode, module=module, microbatch_size=4)(x)
    assert type(encoded) is Encoded
    assert encoded.nothing is None
    assert torch.equal(encoded.label, x[:, 0] > 0)
    assert torch.equal(others["rows"], x)
    assert not others["rows"].requires_grad
    assert others["unused"].requires_grad
    contrastive(encoded.z).backward()
    assert_all_close(taken(module), due)


def test_a_window_is_taken_as_it_is_cut():
    x = rows()
    module = network()
    due = uncut(module, x)
    first = x[:5].clone().requires_grad_()
    z = vb.rowwise(module)(vb.Window([first, x[5:6], x[6:]]))
    contrastive(z).backward()
    leaf = x.clone().requires_grad_()
    assert_all_close(taken(module), due)
    contrastive(module(leaf)).backward()
    assert_close(first.grad.numpy(), leaf.grad[:5].numpy())
    with torch.no_grad():
        assert_close(vb.rowwise(module)(vb.Window([x[:5], x[5:]])).numpy(), module(x).numpy())


def test_a_packed_window_returns_its_rows_as_a_number():
    module = nn.Embedding(9, 4, sparse=True).double()
    lengths = torch.tensor([3, 1, 4, 2, 5, 3, 1])
    ids = (torch.arange(35).reshape(7, 5) % 8 + 1) * (torch.arange(5) < lengths[:, None])

    def encode(batch):
        mask = (batch["ids"] != 0)[..., None]
        mean = (module(batch["ids"]) * mask).sum(1) / mask.sum(1)
        return {"z": mean, "row": batch["row"]}

    batch = {"ids": ids, "row": torch.arange(7)}
    contrastive(encode(batch)["z"]).backward()
    due = taken(module)
    window = pack(batch, lengths, microbatch_tokens=9)
    found = vb.rowwise(encode, module=module)(window)
    contrastive(found["z"][torch.argsort(found["row"])]).backward()
    assert module.weight.grad.is_sparse
    assert_all_close(taken(module), due)


def test_dropout_draws_the_same_masks_again_and_the_next_number_is_that_after_one_pass():
    module, x = network(nn.Dropout(0.3)), rows()
    torch.manual_seed(1)
    loss, due, _ = in_one_graph(module, x, 3)
    following = torch.rand(3)
    torch.manual_seed(1)
    found, gradients = by_rowwise(module, x, accumulation_steps=3)
    assert torch.equal(torch.rand(3), following)
    assert found == pytest.approx(loss, rel=1e-15)
    assert_all_close(gradients, due)


def test_batchnorm_takes_one_update_with_the_moments_of_all_rows():
    module, x = network(nn.BatchNorm1d(8)), rows()
    due = in_one_graph(module, x, 3)[1]
    other = in_one_graph(module, x, 1)[2]
    assert_all_close(by_rowwise(module, x, accumulation_steps=3)[1], due)
    for name, buffer in other.named_buffers():
        assert_close(module.get_buffer(name).numpy(), buffer.numpy())
    assert module[1].momentum == 0.1
    assert not module[1]._forward_hooks


def test_state_that_changes_with_each_call_is_met_again():
    module, x = network(), rows()
    nn.utils.parametrizations.spectral_norm(module[0])
    _, due, other = in_one_graph(module, x, 3)
    assert_all_close(by_rowwise(module, x, accumulation_steps=3)[1], due)
    for name, buffer in other.named_buffers():
        assert_close(module.get_buffer(name).numpy(), buffer.numpy())


def test_generators_of_all_devices_are_set_back():
    # A model may be on several; "meta" stands for one here, and draws nothing.
    module = nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2, device="meta")])
    found = inventory(module, hands_over=True)
    assert found.accelerator is None
    assert found.devices == [torch.device("meta")]
    frozen = inventory(nn.ModuleList([module[0], nn.BatchNorm1d(2, affine=False, device="meta")]))
    assert frozen.devices == [torch.device("meta")]
    inputs = Inputs(module, inventory(module[0]), read(torch.ones(2, 2, device="meta")), ())
    assert inputs.devices == {torch.device("meta")}


class Counted(nn.Module):
    def __init__(self, replaces):
        super().__init__()
        self.net = network()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self._replaces = replaces

    def forward(self, x):
        if self._replaces:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return self.net(x) * self.calls.clone()


@pytest.mark.parametrize("replaces", [False, True])
def test_a_buffer_that_counts_calls(replaces):
    module, x = Counted(replaces), rows()
    _, due, other = in_one_graph(module, x, 3)
    assert_all_close(by_rowwise(module, x, accumulation_steps=3)[1], due)
    assert module.calls.item() == other.calls.item() == 3


def test_modes_that_change_between_the_passes():
    module, x = network(nn.Dropout(0.3)), rows()
    torch.manual_seed(1)
    due = in_one_graph(module, x, 3)[1]
    torch.manual_seed(1)
    loss = contrastive(vb.rowwise(module, accumulation_steps=3)(x))
    module.eval()
    module[0].requires_grad_(False)
    loss.backward()
    assert not any(layer.training for layer in module.modules())
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    # As in a graph, what is frozen by now gets nothing.
    assert_all_close(taken(module), [None, None, *due[2:]])


@pytest.mark.parametrize("training", [True, False])
def test_graphs_of_others_that_keep_statistics_stay_right(training):
    module, x = network(nn.BatchNorm1d(8), nn.Dropout(0.0)), rows()
    module[1].train(training)
    encode = vb.rowwise(module, microbatch_size=4)
    due = in_one_graph(module, x[:4], 1)[1]
    # One piece has a graph of its own; the others are given statistics anew.
    few = contrastive(encode(x[:4]))
    z = encode(x)
    more = contrastive(module(x[:4]))
    z.sum().backward()
    module.zero_grad()
    (few + more).backward()
    if training:
        assert_all_close(taken(module), [2 * g for g in due])


@pytest.mark.parametrize("inside", [vb.backward, vb.loss])
def test_inside_a_window_of_one_micro_batch(inside):
    module, x = network(nn.BatchNorm1d(8)), rows()
    temperature = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    due = in_one_graph(module, x, 3)[1]
    other = in_one_graph(module, x, 1)[2]
    encode = vb.rowwise(module, accumulation_steps=3)

    def loss_fn(batch):
        return contrastive(encode(batch)) * temperature

    loss = inside(loss_fn, x, module=[module, temperature], microbatch_size=ROWS)
    if inside is vb.loss:
        loss.backward()
    assert_all_close([2 * g for g in taken(module)], due)
    for name, buffer in other.named_buffers():
        assert_close(module.get_buffer(name).numpy(), buffer.numpy())


def test_an_exception_in_the_second_pass_leaves_a_window_as_it_was():
    module, x = network(nn.BatchNorm1d(8)), rows()
    temperature = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    module[0].weight.grad = before = torch.ones_like(module[0].weight)
    hook = module[0].weight.register_hook(lambda g: g)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    calls = 0

    def failing(x):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyError("row 5")
        return module(x)

    encode = vb.rowwise(failing, module=module, accumulation_steps=3)
    options = {"module": [module, temperature], "microbatch_size": ROWS, "check": False}
    with pytest.raises(KeyError, match="row 5"):
        vb.backward(lambda x: contrastive(encode(x)) * temperature, x, **options)
    assert calls == 5
    assert module[0].weight.grad is before
    assert bool((before == 1).all())
    assert temperature.grad is None
    assert module[2].weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert list(module[0].weight._backward_hooks) == [hook.id]
    assert not module[1]._forward_hooks


@pytest.mark.parametrize("keeps_casts", [False, True])
def test_autocast_is_that_of_the_first_pass(keeps_casts):
    module, x = network().float(), rows().float()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=keeps_casts):
        due = [contrastive(torch.cat([module(piece) for piece in x.tensor_split(3)]).float())]
        encode = vb.rowwise(module, accumulation_steps=3)
        found = [contrastive(encode(x).float())]
    assert found[0].item() == due[0].item()
    due[0].backward()
    due = taken(module)
    found[0].backward()
    # A kept cast of a weight sums its gradients in bfloat16; here each micro-batch has its own.
    assert_all_close(taken(module), due, 2.0**-6 if keeps_casts else 1e-30)


def test_a_scaler_scales_what_arrives():
    module, x = network(), rows()
    due = uncut(module, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(contrastive(vb.rowwise(module, microbatch_size=4)(x))).backward()
    assert_all_close([g / 1024 for g in taken(module)], due)


def test_gradients_of_half_precision_are_summed_wider():
    weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    encode = vb.rowwise(lambda x: (x * 0 + weight).float(), module=weight, microbatch_size=1)
    encode(torch.ones(512, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad.item() == 512
    assert weight.grad.dtype == torch.bfloat16


def test_large_parameters_and_ones_that_share_their_gradient():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                nn.Parameter(torch.ones(2**15, dtype=torch.float64)) for _ in range(2)
            )

        def forward(self, x):
            return (self.first[None] + self.second[None]) * x

    module, x = Sum(), torch.ones(5, 2**15, dtype=torch.float64)
    vb.rowwise(module, microbatch_size=2)(x).sum().backward()
    # Both gradients are one tensor of autograd's, and must be two sums.
    assert all(bool((p.grad == 5).all()) for p in module.parameters())


def test_hooks_of_others_hear_the_gradient_of_the_whole_batch_once():
    module, x = network(), rows()
    due = uncut(module, x)
    heard, stepped = [], []
    module[0].weight.register_hook(lambda g: heard.append(g.numpy().copy()) or 2 * g)
    module[0].weight.register_post_accumulate_grad_hook(lambda p: stepped.append(p.grad.clone()))
    found = by_rowwise(module, x)[1]
    assert_all_close(heard, due[:1])
    assert len(stepped) == 1
    assert_all_close(found, [2 * due[0], *due[1:]])


def test_hooks_of_what_gets_no_gradient_hear_nothing():
    module, other, x = network(), network(), rows()
    heard = []
    weight = other[0].weight
    weight.register_hook(lambda g: heard.append(g.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.clone()))
    kept = [
        list(weight._backward_hooks.values()),
        list(weight._post_accumulate_grad_hooks.values()),
    ]
    encode = vb.rowwise(lambda x: (module(x), other(x)), module=[module, other], microbatch_size=4)
    for _ in range(2):
        contrastive(encode(x)[0]).backward()
        assert not heard
        # One that came before is none of this pass.
        weight.grad = torch.ones_like(weight)
    weight.grad = None
    (contrastive(encode(x)[0]) + contrastive(other(x))).backward()
    assert_all_close([g.numpy() for g in heard], 2 * uncut(network(), x)[:1])
    assert [
        list(weight._backward_hooks.values()),
        list(weight._post_accumulate_grad_hooks.values()),
    ] == kept


@pytest.mark.parametrize("reads", ["loss", "nothing", "labels"])
def test_calls(reads):
    module, x = network(), rows()
    for parameter in module.parameters():
        parameter.requires_grad_(reads != "nothing")
    calls = 0

    def encode(x):
        nonlocal calls
        calls += 1
        return module(x), x[:, 0]

    z, label = vb.rowwise(encode, module=module, microbatch_size=4)(x)
    assert calls == 4
    assert z.requires_grad == (reads != "nothing")
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    ((label if reads == "labels" else z).sum() * weight).backward()
    assert calls == (8 if reads == "loss" else 4)
    with torch.no_grad():
        vb.rowwise(encode, module=module, microbatch_size=4)(x)
    assert calls == (9 if reads == "loss" else 5)


def test_a_half_that_is_frozen():
    module, x = network(), rows()
    module[0].requires_grad_(False)
    due = uncut(module, x)
    assert due[0] is None
    assert_all_close(by_rowwise(module, x)[1], due)


def test_fn_may_checkpoint_make_leaves_and_change_its_rows():
    module, x = network(nn.Dropout(0.0)), rows()
    due = uncut(module, x)
    before = x.clone()
    for fn in (
        lambda x: checkpoint(module, x, use_reentrant=False),
        lambda x: module(x.clone().requires_grad_()),
        lambda x: module(x.mul_(2.0).div_(2.0)),
        vb.rowwise(module, microbatch_size=2),
    ):
        assert_all_close(by_rowwise(module, x, fn)[1], due)
    assert torch.equal(x, before)
    encode = vb.rowwise(module, microbatch_size=4)
    contrastive(checkpoint(encode, x, use_reentrant=False)).backward()
    assert_all_close(taken(module), due)


def test_the_first_pass_takes_the_branch_of_one_with_gradients():
    # In evaluation mode and without gradients this layer leaves padding out, and puts zeros there.
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True).double().eval()
    x, padding = rows(12).reshape(12, 6, 1).expand(-1, -1, 8), torch.arange(6) >= 3

    def encode(x):
        return layer(x, src_key_padding_mask=padding.expand(len(x), -1)).mean(1)

    found = vb.rowwise(encode, module=layer, microbatch_size=4)(x)
    assert_close(found.detach().numpy(), encode(x).detach().numpy())


def test_one_backward_pass_or_as_many_as_graphs_are_kept_for():
    module, x = network(), rows()
    due = uncut(module, x)
    loss = contrastive(vb.rowwise(module, microbatch_size=4)(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_all_close(taken(module), [2 * g for g in due])
    z = vb.rowwise(module, microbatch_size=4)(x)
    z.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        z.sum().backward()


def test_a_parameter_that_changes_between_the_passes_is_refused_by_pytorch():
    module = network()
    z = vb.rowwise(module, microbatch_size=4)(rows())
    with torch.no_grad():
        module[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    assert taken(module) == [None] * 4


def test_a_second_derivative_is_refused_and_a_graph_of_the_first_is_not():
    module, x = network(), rows()
    due = uncut(module, x)
    loss = contrastive(vb.rowwise(module, microbatch_size=4)(x))
    gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    assert_all_close([g.detach().numpy() for g in gradients], due)
    with pytest.raises(RuntimeError, match="Got a second derivative"):
        gradients[0].sum().backward()


# Where the loss around it is compiled, PyTorch looks at the results for guards of its own.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.thorough("compiles four programs")
def test_compiled_outside_and_inside():
    # Whoever does not compile does not load it.
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module, x = network(nn.Dropout(0.0)), rows()
    due = uncut(module, x)
    encode = vb.rowwise(torch.compile(module, backend=counter), microbatch_size=4)
    step = torch.compile(
        lambda x: contrastive(vb.rowwise(module, microbatch_size=4)(x)), backend=counter
    )
    for run in (lambda x: contrastive(encode(x)), step):
        run(x).backward()
        assert_all_close(taken(module), due)
        compiled = counter.frame_count
        for _ in range(2):
            run(x).backward()
            assert_all_close(taken(module), due)
        assert counter.frame_count == compiled
