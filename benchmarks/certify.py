"""How long a check of ten million parameters takes, and what it says.

Three dense layers, two of them of 3,200 units, on 64 rows in micro-batches of 16, once as a mean
and once as a sum, which is wrong and has to be explained. Each engine in a process of its own.

Usage: python benchmarks/certify.py [--engines torch jax tensorflow keras] [--json FILE]
"""

import time
from collections.abc import Callable
from typing import Any

from command import apart, parser_of, save

from virtualbatch.bench.case import CLASSES, Case
from virtualbatch.bench.children import tell

ENGINES = ["torch", "jax", "tensorflow", "keras"]
ROWS, MICROBATCH_SIZE, SCALE = 64, 16, 25

# Whether the loss is a sum -> its certificate.
Certified = Callable[[bool], Any]


def on_torch(case: Case) -> Certified:
    import virtualbatch.torch as vb
    from virtualbatch.bench.torch_models import problem

    given = problem(case)

    def certified(is_sum: bool) -> Any:
        def loss(batch: Any) -> Any:
            return given.loss(given.model, batch) * (len(batch[0]) if is_sum else 1)

        return vb.certify(
            loss, given.batch, module=given.model, microbatch_size=case.microbatch_size
        )

    return certified


def on_jax(case: Case) -> Certified:
    import virtualbatch.jax as vb
    from virtualbatch.bench.jax_models import problem

    given = problem(case)

    def certified(is_sum: bool) -> Any:
        def loss(params: Any, batch: Any) -> Any:
            return given.loss(params, batch) * (len(batch[0]) if is_sum else 1)

        return vb.certify(loss, microbatch_size=case.microbatch_size)(given.params, given.batch)

    return certified


def on_tensorflow(case: Case) -> Certified:
    import virtualbatch.tensorflow as vb
    from virtualbatch.bench.tensorflow_ways import problem

    given = problem(case)

    def certified(is_sum: bool) -> Any:
        def loss(batch: Any) -> Any:
            return given.loss(batch) * (len(batch[0]) if is_sum else 1)

        variables = given.model.trainable_variables
        return vb.certify(loss, given.batch, variables, microbatch_size=case.microbatch_size)

    return certified


def on_keras(case: Case) -> Certified:
    import keras

    import virtualbatch.keras as vb
    from virtualbatch.bench.keras_models import model_of

    model = model_of(case)

    def certified(is_sum: bool) -> Any:
        def loss(y: Any, found: Any) -> Any:
            losses = keras.losses.sparse_categorical_crossentropy(y, found, from_logits=True)
            return keras.ops.sum(losses) if is_sum else keras.ops.mean(losses)

        model.compile("sgd", loss)
        return vb.certify(model, case.batch(), microbatch_size=case.microbatch_size)

    return certified


def case_of(engine: str) -> Case:
    return Case(engine, "MLP", MICROBATCH_SIZE, ROWS // MICROBATCH_SIZE, SCALE)


def measured(engine: str) -> dict[str, Any]:
    certified = globals()[f"on_{engine}"](case_of(engine))
    result = {}
    for reduce in ("mean", "sum"):
        start = time.perf_counter()
        found = certified(reduce == "sum")
        kinds = [finding.kind for finding in found.findings]
        result[reduce] = {
            "exact": found.exact,
            "findings": kinds,
            "seconds": time.perf_counter() - start,
        }
    return result


def main() -> None:
    arguments = parser_of(__doc__, engines=ENGINES).parse_args()
    if arguments.one:
        tell(measured(*arguments.one))
        return
    case = case_of("torch")
    width = case.width
    count = (case.input_shape[0] + width + CLASSES) * width
    print(f"{count:,} parameters, {ROWS} rows in micro-batches of {MICROBATCH_SIZE}")
    results = {}
    for engine in arguments.engines:
        results[engine] = apart(engine)
        for reduce, found in results[engine].items():
            verdict = "exact" if found["exact"] else ", ".join(found["findings"])
            print(f"{engine:12}{reduce:6}{verdict:12}{found['seconds']:6.1f} s")
    save(arguments.json, results)


if __name__ == "__main__":
    main()
