"""What a jitted window costs: traces, arithmetic, temporary memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.jax.problems import pieces
from tests.tiers import tiered

import virtualbatch.jax as vb

pytestmark = pytest.mark.usefixtures("optimized")

SIZE, WIDTH = 32, 64
# Four square layers of float32.
GRADIENT_BYTES = 4 * 4 * WIDTH * WIDTH
WEIGHTS = {
    "rows": None,
    "one": lambda batch: {"a": batch["a"].sum()},
    "two": lambda batch: {"a": batch["a"].sum(), "b": batch["b"].sum()},
    "two and None": lambda batch: {"a": batch["a"].sum(), "b": batch["b"].sum(), "c": None},
}


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


def params():
    random = np.random.default_rng(0)
    return [random.normal(size=(WIDTH, WIDTH)).astype("float32") / 8 for _ in range(4)]


def batch(rows):
    x = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype("float32")
    return {"x": x, "a": np.ones(rows, "float32"), "b": np.ones(rows, "float32")}


class Loss:
    """A deep enough network whose terms share their forward; it counts its traces."""

    def __init__(self, terms="rows", aux=None):
        self.terms, self.aux, self.traced = terms, aux, []

    def __call__(self, params, batch):
        self.traced.append(batch["x"].shape[0])
        x = batch["x"]
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        errors = (x**2).mean(1)
        a, b = batch["a"], batch["b"]
        found = {
            "a": (errors * a).sum() / a.sum(),
            "b": (errors**2 * b).sum() / b.sum(),
            "c": errors.mean(),
        }
        names = {"rows": "c", "one": "a", "two": "ab", "two and None": "abc"}[self.terms]
        result = {name: found[name] for name in names}
        return result if self.aux is None else (result, self.aux(errors))

    def window(self, **options):
        has_aux = self.aux is not None
        return jax.jit(
            vb.value_and_grad(self, has_aux=has_aux, weight=WEIGHTS[self.terms], **options)
        )

    def compiled(self, rows):
        return self.window(microbatch_size=SIZE).lower(params(), batch(rows)).compile()


@pytest.mark.parametrize("terms", tiered(WEIGHTS, ["two and None"], "further weights"))
@pytest.mark.parametrize(
    "aux",
    [
        pytest.param(None, marks=pytest.mark.thorough("less than with aux")),
        lambda errors: (errors, errors.mean()),
    ],
)
def test_the_loss_is_traced_once_per_shape(terms, aux):
    # With aux at one size of micro-batch, one more abstract trace tells rows from classes.
    abstract = [] if aux is None else [2 * SIZE]
    for rows, due in ((SIZE, [SIZE]), (4 * SIZE, [SIZE, *abstract]), (4 * SIZE + 7, [SIZE, 7])):
        loss = Loss(terms, aux)
        update = loss.window(microbatch_size=SIZE)
        for _ in range(3):
            update(params(), batch(rows))
        assert loss.traced == due
    loss = Loss(terms, aux)
    update = loss.window()
    for _ in range(2):
        update(params(), vb.Window(pieces(batch(96), 0, 32, 48, 80, 96)))
    assert loss.traced == [32, 16]


def flops(terms):
    return Loss(terms).compiled(4 * SIZE).cost_analysis()["flops"]


def test_terms_share_their_forward():
    # Per micro-batch one product of matrices is 2 * 32 * 64 * 64 operations: 4 forward, 7 backward.
    product = 2 * SIZE * WIDTH * WIDTH
    one, two = flops("one"), flops("two")
    assert 11 <= one / product < 11.6
    assert 7 <= (two - one) / product < 7.6


def aux(errors):
    return errors.mean(), jnp.sum(errors > 0.1)


# What is not the micro-batch: its share and its number, for each weight.
@pytest.mark.parametrize("terms", tiered(["rows", "one"], ["one"], "further weights"))
@pytest.mark.parametrize("rest", tiered([0, 7, 31], [7], "further remainders"))
@pytest.mark.parametrize("aux", tiered([None, aux], [None], "with aux, too"))
def test_temporary_memory_does_not_depend_on_the_number_of_micro_batches(terms, rest, aux):
    def size(count):
        found = Loss(terms, aux).compiled(count * SIZE + rest)
        return found.memory_analysis().temp_size_in_bytes

    few, many = size(4), size(64)
    numbers_per_microbatch = 3 * (terms == "one")
    assert many - few <= 0.01 * few + 60 * 4 * numbers_per_microbatch
    # A remainder runs after the loop, in the same memory but for one more set of gradients.
    without = Loss(terms, aux).compiled(4 * SIZE).memory_analysis().temp_size_in_bytes
    assert few <= 1.01 * without + GRADIENT_BYTES * (rest > 0)
    whole = jax.jit(jax.grad(lambda p, b: jnp.sum(Loss("rows")(p, b)["c"])))
    assert (
        whole.lower(params(), batch(64 * SIZE)).compile().memory_analysis().temp_size_in_bytes
        > 20 * many
    )


@pytest.mark.parametrize("rest", tiered([40, 63], [40], "further remainders"))
@pytest.mark.parametrize("full", tiered([1, 2, 4], [2], "further numbers of micro-batches"))
def test_a_remainder_does_not_run_beside_what_comes_before_it(full, rest):
    # Of convolutions XLA would begin a second forward pass as soon as it can.
    kernels = [jnp.ones((3, 3, 3, 16)), jnp.ones((3, 3, 16, 32))]

    def loss(kernels, images):
        for kernel in kernels:
            images = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return jnp.mean(images**2)

    def size(rows):
        window = jax.jit(vb.value_and_grad(loss, microbatch_size=64))
        found = window.lower(kernels, jnp.ones((rows, 16, 16, 3))).compile().memory_analysis()
        return found.temp_size_in_bytes

    gradients = sum(kernel.nbytes for kernel in kernels)
    assert size(64 * full + rest) <= 1.01 * size(64) + 2 * gradients


def test_the_result_of_donated_parameters_takes_their_place():
    def update(params, batch):
        gradients = vb.value_and_grad(Loss(), microbatch_size=SIZE)(params, batch)[1]
        return jax.tree.map(jnp.subtract, params, gradients)

    compiled = jax.jit(update, donate_argnums=0).lower(params(), batch(4 * SIZE)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == GRADIENT_BYTES
