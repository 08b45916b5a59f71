"""Programs that fail, each in a way of its own, for `virtualbatch check` and `plan`."""

import sys

import torch


def program(batch_size, **more):
    """One that works, with some of its arguments replaced."""
    module = torch.nn.Linear(4, 1)
    batch = torch.ones(batch_size, 4)
    return {"loss_fn": lambda x: module(x).mean(), "batch": batch, "module": module} | more


def of_jax(batch_size, **more):
    # Never run: it is refused before.
    return {"fun": lambda params, batch: 0.0, "args": (), **more}


def with_loss(error):
    def loss_fn(x):
        raise error

    return lambda batch_size: program(batch_size, loss_fn=loss_fn)


class NoText(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class NoException(BaseException):
    pass


loss_raises = with_loss(RuntimeError("no such\n column"))
loss_raises_value_error = with_loss(ValueError("bad value"))
loss_raises_type_error = with_loss(TypeError("bad type"))
loss_raises_key_error = with_loss(KeyError("labels"))
loss_raises_nothing_said = with_loss(ZeroDivisionError())
loss_raises_memory_error = with_loss(MemoryError("my pool is empty"))
loss_raises_os_error = with_loss(FileNotFoundError(2, "No such file", "data.csv"))
loss_raises_import_error = with_loss(ModuleNotFoundError("No module named 'absent'"))
loss_raises_unicode = with_loss(ValueError("\ud800 größe"))
loss_raises_without_text = with_loss(NoText())
loss_raises_no_exception = with_loss(NoException("not even one"))
loss_recurses = with_loss(RecursionError("maximum recursion depth exceeded"))
loss_stops = with_loss(StopIteration())
loss_asserts = with_loss(AssertionError())
loss_exits_well = with_loss(SystemExit(0))
loss_exits = with_loss(SystemExit("no data"))
loss_is_interrupted = with_loss(KeyboardInterrupt())


def deep(x):
    return {}["labels"]


def loss_raises_in_a_library(batch_size):
    return program(batch_size, loss_fn=lambda x: torch.nn.functional.mse_loss(x, "y"))


def loss_raises_deep(batch_size):
    return program(batch_size, loss_fn=lambda x: deep(x))


def loss_gives_none(batch_size):
    return program(batch_size, loss_fn=lambda x: None)


def loss_gives_rows(batch_size):
    return program(batch_size, loss_fn=lambda x: x)


def loss_is_none(batch_size):
    return program(batch_size, loss_fn=None)


def module_is_none(batch_size):
    return program(batch_size, module=None)


def module_is_text(batch_size):
    return program(batch_size, module="model")


def batch_is_none(batch_size):
    return program(batch_size, batch=None)


def batch_is_empty(batch_size):
    return program(batch_size, batch=[])


def batch_is_text(batch_size):
    return program(batch_size, batch="rows")


def rows_differ(batch_size):
    return program(batch_size, batch=[torch.ones(batch_size), torch.ones(3)])


def other_rows(batch_size):
    return program(batch_size, batch=torch.ones(3, 4))


def one_more(batch_size):
    return program(batch_size, learning_rate=0.1)


def its_own_size(batch_size):
    return program(batch_size, microbatch_size=2)


def no_text_as_name(batch_size):
    return program(batch_size) | {3: 4}


def args_of_nothing(batch_size):
    return of_jax(batch_size)


def args_of_one(batch_size):
    return of_jax(batch_size, args=(1.0,))


def args_of_none(batch_size):
    return of_jax(batch_size, args=None)


def args_of_text(batch_size):
    return of_jax(batch_size, batch_argnum="batch")


def args_far_away(batch_size):
    return of_jax(batch_size, args=(1.0, 2.0), batch_argnum=(0, 7))


def program_raises(batch_size):
    raise ValueError("no data")


def program_exits_well(batch_size):
    sys.exit(0)


def program_runs_out(batch_size):
    raise MemoryError


def program_without_rows():
    return program(8)


def program_gives_a_list(batch_size):
    return [1, 2]


def program_gives_text(batch_size):
    return "loss_fn"


async def program_later(batch_size):
    return program(batch_size)
