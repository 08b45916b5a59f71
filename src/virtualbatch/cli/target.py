"""The target of `virtualbatch plan` and `check`: a function of the user that returns a program.

The function takes the number of rows of a batch and returns the arguments of an engine's `plan` as
a dict. The names of the arguments decide which engine is used.
"""

import importlib
import importlib.util
import inspect
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from virtualbatch.certify.certificate import Certificate
from virtualbatch.cli.refusals import in_words, is_said
from virtualbatch.plan.plan import Plan
from virtualbatch.window.tree import array_leaves, common_rows


class Engine(NamedTuple):
    """How an engine's `plan` is called.

    Fields:
        module: the name of the engine's module. It is a text, because the command line imports no
            engine.
        arguments: the names by which this engine is recognised.
        line: the code to write with the size that was found.
    """

    module: str
    arguments: frozenset[str]
    line: str


ENGINES = (
    Engine(
        "virtualbatch.keras",
        frozenset({"model", "batch"}),
        "vb.accumulate(model, microbatch_size={})",
    ),
    Engine(
        "virtualbatch.torch",
        frozenset({"loss_fn", "batch", "module"}),
        "loss = vb.backward(loss_fn, batch, module=module, microbatch_size={})",
    ),
    Engine(
        "virtualbatch.tensorflow",
        frozenset({"loss_fn", "batch", "variables"}),
        "loss, gradients = vb.value_and_gradients(loss_fn, batch, variables, microbatch_size={})",
    ),
    Engine(
        "virtualbatch.jax",
        frozenset({"fun", "args"}),
        "value, grads = vb.value_and_grad(fun, microbatch_size={})(*args)",
    ),
)


class Target(NamedTuple):
    """A program to plan or to check.

    Fields:
        engine: the engine whose `plan` and `certify` are called.
        arguments: the arguments of `plan` and `certify`, by name.
    """

    engine: Engine
    arguments: Mapping[str, Any]

    def plan(self, memory_limit: str | None) -> Plan:
        """Makes the plan.

        Args:
            memory_limit: as the engine's `plan` takes it.

        Raises:
            ValueError: not even one row fits, or an argument is wrong.
            TypeError: an argument is of the wrong kind.
        """
        found: Plan = self._called("plan", memory_limit=memory_limit)
        return found

    def certify(self, microbatch_size: int) -> Certificate:
        """Compares the accumulated with the uncut gradient.

        Args:
            microbatch_size: rows of one micro-batch.

        Raises:
            ValueError: there is nothing to compare, or an argument is wrong.
            TypeError: an argument is of the wrong kind.
        """
        found: Certificate = self._called("certify", microbatch_size=microbatch_size)
        return found

    def _called(self, name: str, **more: Any) -> Any:
        function = getattr(importlib.import_module(self.engine.module), name)
        arguments = dict(self.arguments)
        args = arguments.pop("args", None)
        verb = f"{self.engine.module}.{name}"
        taken = set(inspect.signature(function).parameters) - set(more)
        if strange := [argument for argument in arguments if argument not in taken]:
            raise ValueError(
                f"TARGET must return arguments of {verb}, without {' or '.join(more)}. "
                f"Got {strange[0]!r} among them. Leave it out."
            )
        try:
            found = function(**arguments, **more)
            return found if args is None else found(*args)
        except (Exception, SystemExit) as error:
            if is_said(error):
                raise
            raise ValueError(
                f"TARGET must return a program that runs. Got {in_words(error)}. "
                f"Call {verb} with it in Python to see the whole traceback."
            ) from error

    def batch(self) -> Any:
        """The batch among the arguments.

        Raises:
            ValueError: `args` holds no batch.
        """
        if "args" not in self.arguments:
            return self.arguments["batch"]
        args, position = self.arguments["args"], self.arguments.get("batch_argnum", 1)
        try:
            return [args[k] for k in position] if isinstance(position, Sequence) else args[position]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(
                "args must be a tuple that holds the batch at batch_argnum. "
                f"Got args={reprlib.repr(args)} and batch_argnum={position!r}. "
                "Return for example args=(params, batch)."
            ) from error


def load(target: str, batch_size: int) -> Target:
    """Calls the user's function.

    Args:
        target: "file.py:function" or "module:function".
        batch_size: the number of rows, its only argument.

    Raises:
        ValueError: the target cannot be imported, raises an error, or returns anything else.
    """
    function = _function(target)
    try:
        found = function(batch_size)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"TARGET must return a program. Got {in_words(error)}, from "
            f"{target}({batch_size}). Try it in Python first."
        ) from error
    names = " or ".join(
        "{" + ", ".join(sorted(engine.arguments)) + "}"
        for engine in sorted(ENGINES, key=lambda engine: engine.module)
    )
    if not isinstance(found, Mapping):
        raise ValueError(
            f"TARGET must return a dict with the arguments of an engine's plan: {names}. "
            f"Got {type(found).__name__} from {target}({batch_size}). Return such a dict."
        )
    for engine in ENGINES:
        if engine.arguments <= set(found):
            return _checked(Target(engine, found), batch_size)
    raise ValueError(
        f"TARGET must return a dict with the arguments of an engine's plan: {names}. "
        f"Got {{{', '.join(sorted(map(str, found)))}}} from {target}({batch_size}). "
        "Name them so."
    )


def _checked(target: Target, batch_size: int) -> Target:
    rows = common_rows(array_leaves(target.batch()))
    if rows is not None and rows != batch_size:
        raise ValueError(
            "TARGET must return a batch of as many rows as it is asked for. "
            f"Got {rows} rows and --batch-size {batch_size}. Make the batch from the argument."
        )
    return target


def _function(target: str) -> Callable[[int], Any]:
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(
            "TARGET must be file.py:function or module:function. "
            f"Got {target!r}. Pass for example train.py:program."
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_path(place)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"TARGET must name a module that can be imported. Got {in_words(error)}, from "
            f"{place!r}. Run: python {place if place.endswith('.py') else f'-m {place}'}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(
            f"TARGET must name a function. Got no function {name!r} in {place!r}. "
            "Pass for example train.py:program."
        )
    return function  # type: ignore[no-any-return]


def _from_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # As when the file is run, modules beside it can be imported, and its classes can be pickled.
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_path(name: str) -> ModuleType:
    # Python puts the folder of this command on the path, not the user's folder.
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)
