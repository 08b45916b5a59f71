"""The private parts of PyTorch that the engine stands on, so that an upgrade breaks here first."""

import importlib

import pytest
import torch
from tests.private_names import private_imports, private_names

# Private names in src, by what has them. Whoever uses another one names it here.
NAMES = {
    "module": {"_buffers", "_forward_hooks", "_modules", "_parameters"},
    "parameter": {"_post_accumulate_grad_hooks", "_version"},
    "storage": {"_cdata"},
    "torch": {"_foreach_add_", "_foreach_copy_", "_foreach_zero_"},
    "operation": {"_schema"},
}
# Of Accelerate and Lightning, which tests/torch/test_refusals.py stands in for.
OF_OTHERS = {"_automatic_optimization", "_shared_state", "_trainer"}
IMPORTS = {
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
}


def test_every_private_name_in_use_is_named_here():
    assert private_names("torch") == set().union(*NAMES.values(), OF_OTHERS)
    assert private_imports("torch", r"torch\b.*\._") == IMPORTS


@pytest.mark.parametrize("name", IMPORTS)
def test_what_is_imported_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_torch_has_every_private_name():
    module = torch.nn.Linear(1, 1)
    owners = {
        "module": module,
        "parameter": module.weight,
        "storage": module.weight.untyped_storage(),
        "torch": torch,
        "operation": torch.ops.aten.add.Tensor,
    }
    for owner, names in NAMES.items():
        assert not {name for name in names if not hasattr(owners[owner], name)}
