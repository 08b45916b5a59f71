"""The private parts of PyTorch that the engine stands on, so that an upgrade breaks here first."""

import importlib

import pytest
import torch
from tests.private_names import private_imports, private_names
from tests.torch.ranks import run
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

# Private names in src, by what has them. Whoever uses another one names it here.
NAMES = {
    "module": {
        "_buffers",
        "_forward_hooks",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_modules",
        "_parameters",
    },
    "loss": {"_is_view"},
    "parameter": {"_backward_hooks", "_post_accumulate_grad_hooks", "_version"},
    "storage": {"_cdata"},
    "bindings": {
        "_autograd",
        "_current_graph_task_id",
        "_len_torch_dispatch_stack",
        "_only_lift_cpu_tensors",
        "_pop_torch_dispatch_stack",
        "_set_only_lift_cpu_tensors",
    },
    "dispatch": {
        "_is_in_any_mode_without_ignore_compile_internals",
        "_is_in_non_infra_torch_dispatch_mode",
        "_is_in_torch_dispatch_mode",
    },
    "modes": {"_unsafe_preserve_version_counter"},
    "of autograd": {"_top_saved_tensors_default_hooks"},
    "torch": {"_foreach_add_", "_foreach_copy_", "_foreach_zero_"},
    "operation": {"_schema"},
}
# Of DistributedDataParallel, whose reducer is armed and read as Accelerate and Lightning do it.
OF_REPLICATED = {
    "module": {
        "_check_reducer_finalized",
        "_comm_hooks",
        "_delay_all_reduce_params",
        "_get_ddp_logging_data",
        "_sync_buffers",
    },
    "reducer": {"_get_zeros_like_grad_buckets", "_rebuild_buckets"},
    "variable": {"_execution_engine"},
    # What hooks of PyTorch on several gradients stand on, too.
    "autograd": {"_will_engine_execute_node"},
}
# Of fully sharded modules, which tell neither their dtypes nor what they hold in another way.
OF_SHARDED = {
    "module": {"_get_fsdp_state"},
    "state": {"_fsdp_param_groups", "_is_root"},
    "parameter": {"_unsharded_param"},
}
# Of Accelerate and Lightning, which tests/torch/test_refusals.py stands in for.
OF_OTHERS = {"_automatic_optimization", "_in_backward_optimizers", "_shared_state", "_trainer"}
IMPORTS = {
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
}


def test_every_private_name_in_use_is_named_here():
    tables = (NAMES, OF_REPLICATED, OF_SHARDED)
    known = [names for table in tables for names in table.values()]
    assert private_names("torch") == set().union(*known, OF_OTHERS)
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
        "bindings": torch._C,
        "modes": torch.autograd.grad_mode,
        "dispatch": torch.utils._python_dispatch,
        "of autograd": torch._C._autograd,
        "torch": torch,
        "operation": torch.ops.aten.add.Tensor,
        "loss": module(torch.ones(1)).sum(),
    }
    for owner, names in NAMES.items():
        assert not {name for name in names if not hasattr(owners[owner], name)}


def replicated_names(rank, world):
    module = DistributedDataParallel(torch.nn.Linear(1, 1))
    owners = {
        "module": module,
        "reducer": module.reducer,
        "variable": torch.autograd.Variable,
        "autograd": torch._C,
    }
    pairs = [(owners[owner], name) for owner, names in OF_REPLICATED.items() for name in names]
    return {name for owner, name in pairs if not hasattr(owner, name)}


def test_a_distributed_module_has_every_private_name():
    assert run(replicated_names, 1) == [set()]


def sharded_names(rank, world):
    module = fully_shard(torch.nn.Linear(1, 1))
    module(torch.ones(1, 1))
    state = module._get_fsdp_state()
    (group,) = state._fsdp_param_groups
    owners = {"module": module, "state": state, "parameter": group.fsdp_params[0]}
    pairs = [(owners[owner], name) for owner, names in OF_SHARDED.items() for name in names]
    lacking = {name for owner, name in pairs if not hasattr(owner, name)}
    others = {"gradient_divide_factor", "mp_policy"} - set(vars(group))
    return lacking | others | {"unsharded_accumulated_grad"} - set(vars(group.fsdp_params[0]))


def test_sharded_modules_have_every_private_name():
    assert run(sharded_names, 1) == [set()]
