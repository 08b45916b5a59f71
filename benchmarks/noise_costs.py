"""Windows with statistics and without, for each engine; `noise.py` times them.

8 micro-batches of 32 rows. Dense layers: narrow ones, where the time is mostly overhead, and wide
ones, which use each weight once a row. And convolutions, which use each weight up to 256 times a
row.
"""

from collections.abc import Callable

from virtualbatch.bench.case import Case

ENGINES = [
    "torch",
    "jax",
    "tensorflow",
    "keras on tensorflow",
    "keras on jax",
    "keras on torch",
]
# Name -> model, times the usual width.
MODELS = {"narrow": ("MLP", 1), "wide": ("MLP", 8), "CNN": ("CNN", 2)}

# Whether with statistics -> runs a window and waits for it.
Pair = dict[bool, Callable[[], object]]


def windows_of(engine: str) -> dict[str, Pair]:
    """For each model its windows, each run once already."""
    make = {"torch": on_torch, "jax": on_jax, "tensorflow": on_tensorflow}.get(engine, on_keras)
    found = {}
    for name, (model, scale) in MODELS.items():
        window = make(Case(engine.replace(" on ", "-"), model, scale=scale))
        found[name] = {stats: window(stats) for stats in (False, True)}
        for run in found[name].values():
            run()
    return found


def on_torch(case: Case) -> Callable[[bool], Callable[[], object]]:
    import virtualbatch.torch as vb
    from virtualbatch.bench.torch_models import problem

    given = problem(case)

    def window(stats: bool) -> Callable[[], object]:
        def run() -> None:
            given.model.zero_grad()
            vb.backward(
                lambda batch: given.loss(given.model, batch),
                given.batch,
                module=given.model,
                microbatch_size=case.microbatch_size,
                stats=stats,
            )

        return run

    return window


def on_jax(case: Case) -> Callable[[bool], Callable[[], object]]:
    import jax

    import virtualbatch.jax as vb
    from virtualbatch.bench.jax_models import problem

    given = problem(case)

    def window(stats: bool) -> Callable[[], object]:
        size = case.microbatch_size
        run = jax.jit(vb.value_and_grad(given.loss, microbatch_size=size, stats=stats))
        return lambda: jax.block_until_ready(run(given.params, given.batch))

    return window


def on_tensorflow(case: Case) -> Callable[[bool], Callable[[], object]]:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb
    from virtualbatch.bench.tensorflow_ways import problem

    given = problem(case)

    def window(stats: bool) -> Callable[[], object]:
        @tf.function
        def run(batch: object) -> object:
            return vb.value_and_gradients(
                given.loss,
                batch,
                given.model.trainable_variables,
                microbatch_size=case.microbatch_size,
                stats=stats,
            )

        return lambda: run(given.batch)[0].numpy()

    return window


def on_keras(case: Case) -> Callable[[bool], Callable[[], object]]:
    import keras

    import virtualbatch.keras as vb
    from virtualbatch.bench.keras_models import cross_entropy, model_of

    x, y = case.batch()

    def window(stats: bool) -> Callable[[], object]:
        model = model_of(case)
        # XLA on CPU is the slower choice for TensorFlow.
        model.compile("sgd", cross_entropy(), jit_compile=keras.backend.backend() == "jax")
        vb.accumulate(model, microbatch_size=case.microbatch_size)
        if stats:
            callback = vb.NoiseScale()
            callback.set_model(model)
            callback.on_train_begin()
        return lambda: float(model.train_on_batch(x, y))

    return window
