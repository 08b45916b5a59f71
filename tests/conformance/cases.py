"""Every case of the suite: laws and what they are run on, by the feature that they prove."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.conformance import coupled, laws, peers, random_models, refusals, statistics
from tests.conformance.problems import NAMES

MODES = {"eager": False, "compiled": True}
DTYPES = ["float64", "float32", "bfloat16"]


class Case(NamedTuple):
    """A law on one engine, in one mode, with its arguments.

    Fields:
        feature: row of the table in docs/how_it_works/conformance.md.
        name: the case within its feature; "" where there is only one.
        law: raises AssertionError where the engine breaks it.
        mode: one of `MODES`, or None for a law that has no modes.
        arguments: further arguments of the law.
        thorough: why only the thorough tier runs it; "" for a case of both tiers.
    """

    feature: str
    name: str
    law: Callable[..., None]
    mode: str | None
    arguments: dict[str, Any]
    thorough: str = ""

    @property
    def id(self) -> str:
        return ", ".join(part for part in (self.feature, self.name, self.mode) if part)

    def run(self, engine: Any) -> None:
        """Runs the law.

        Raises:
            AssertionError: the engine breaks it.
        """
        if self.mode is None:
            self.law(engine, **self.arguments)
        else:
            self.law(engine, MODES[self.mode], **self.arguments)


CONSTANT = "JAX differentiates constants, to zeros"
ANY_WEIGHT = "any weight in a compiled window counts as uncut"
READ = "weights are read, and values that are no weight are refused"
# (feature, engine, mode) -> why a case is not run there. The only list of its kind.
DOES_NOT_APPLY = {
    ("nothing is read after the weights", "tensorflow", "eager"): (
        "TensorFlow has no guard against reading; in a graph nothing can be read"
    ),
    ("nothing is read after the weights", "jax", "eager"): (
        "JAX's transfer guard sees no copy on a CPU; under jit nothing can be read"
    ),
    ("values of weights are refused", "tensorflow", "compiled"): "traced values are not read",
    ("values of weights are refused", "jax", "compiled"): "traced values are not read",
    (ANY_WEIGHT, "torch", "compiled"): READ,
    (ANY_WEIGHT, "torch_loss", "compiled"): READ,
    ("a loss of another library is refused", "jax", "eager"): CONSTANT,
    ("a loss of another library is refused", "jax", "compiled"): CONSTANT,
}


def _named(law: Callable[..., None]) -> str:
    number, *words = law.__name__.split("_")
    if law.__module__ == peers.__name__:
        return f"peers' {number.upper()}: {' '.join(words)}"
    return law.__name__.replace("_", " ")


def _in_modes(
    law: Callable[..., None],
    feature: str = "",
    name: str = "",
    arguments: dict[str, Any] | None = None,
    thorough: str | dict[str, str] = "",
) -> list[Case]:
    """Cases of a law in all modes; `thorough` may tell one mode from the other."""
    arguments = arguments or {}
    reasons = thorough if isinstance(thorough, dict) else dict.fromkeys(MODES, thorough)
    return [
        Case(feature or _named(law), name, law, mode, arguments, reasons.get(mode, ""))
        for mode in MODES
    ]


def _cut_and_dtype(name: str, cut: str, dtype: str) -> str | dict[str, str]:
    """Why cases of the law may wait for the thorough tier; "" where they may not."""
    if cut != "ragged":
        return "any_cut_is_the_same tries all cuts"
    if dtype == "float64":
        return ""
    if (name, dtype) == ("terms", "bfloat16"):
        return {"eager": "the folder of each engine has sums in half precision"}
    return "further dtypes of the same sums"


def _all() -> list[Case]:
    found: list[Case] = []
    for name in NAMES:
        for cut in laws.CUTS:
            for dtype in DTYPES:
                arguments = {"name": name, "cut": cut, "dtype": dtype}
                found += _in_modes(
                    laws.equals_the_uncut_batch,
                    f"equals the uncut batch: {name}",
                    f"{cut}, {dtype}",
                    arguments,
                    _cut_and_dtype(name, cut, dtype),
                )
    for law in (
        laws.order_of_rows_does_not_matter,
        laws.terms_by_rows_are_means_over_rows,
        laws.an_empty_micro_batch_adds_nothing,
        laws.an_empty_term_adds_nothing,
        laws.a_window_without_weight_is_zero,
        laws.a_term_without_weight_counts_once,
        laws.gradients_are_like_the_parameters,
        laws.a_parameter_may_be_unused_in_some,
        laws.aux_is_that_of_the_whole_batch,
        laws.the_loss_runs_once_per_micro_batch,
        laws.a_call_leaves_no_trace_of_itself,
    ):
        found += _in_modes(law)
    for name, law in (
        ("", laws.any_weight_in_a_compiled_window_counts_as_uncut),
        ("statistics", statistics.statistics_of_any_weight_in_a_compiled_window),
    ):
        found.append(Case(ANY_WEIGHT, name, law, "compiled", {}))
    for law in (
        laws.the_micro_batch_whose_loss_is_not_finite_is_named,
        laws.an_empty_micro_batch_is_not_named,
    ):
        found.append(Case(_named(law), "", law, None, {}))
    for name, cuts in laws.CUTS_OF_ONE_BATCH.items():
        further = "" if name == "some" else "further cuts of the same batch"
        found += _in_modes(
            laws.any_cut_is_the_same, name=name, arguments={"cuts": cuts}, thorough=further
        )
    found += _in_modes(
        laws.nothing_is_read_after_the_weights,
        thorough={"compiled": "in the graphs of two engines nothing can be read"},
    )
    for name, law in vars(peers).items():
        if name[:1] in "fr" and name[1:2].isdigit():
            found += _in_modes(law, thorough={"compiled": "the laws hold in both modes"})
    found += _in_modes(
        random_models.random_models_equal_their_uncut_batch,
        thorough="what the named models do, in further ones",
    )
    for name in NAMES:
        for cut in statistics.CUTS:
            quick = (name, cut) == ("terms", "uneven")
            found += _in_modes(
                statistics.statistics_are_those_of_the_gradients,
                name=f"{name}, {cut}",
                arguments={"name": name, "cut": cut},
                thorough="" if quick else "further problems and cuts",
            )
    for law in (
        statistics.statistics_of_half_precision_are_wide,
        statistics.statistics_come_after_aux,
        statistics.a_window_without_weight_tells_nothing,
    ):
        found += _in_modes(law)
    for dtype, microbatches in (("bfloat16", 1024), ("float16", 4096)):
        found += _in_modes(
            laws.half_precision_sums_in_float32,
            name=f"{microbatches} micro-batches in {dtype}",
            arguments={"dtype": dtype, "microbatches": microbatches},
            thorough={"eager": "the folder of each engine has such a sum"}
            if dtype == "bfloat16"
            else "a narrow buffer stalls sooner in bfloat16",
        )
    for name in NAMES:
        for law in (
            laws.uncut_is_the_reference,
            laws.one_micro_batch_is_the_ordinary_computation,
        ):
            further = "" if name == "terms" else "further problems"
            if law is laws.uncut_is_the_reference:
                further = "every other case would miss a wrong reference"
            found.append(Case(_named(law), name, law, None, {"name": name}, further))
    for name in coupled.BY_NAME:
        further = "" if name == "clip" else "further losses"
        found += _in_modes(
            coupled.coupled_losses_are_exact,
            name=name.replace("_", " "),
            arguments={"name": name},
            thorough=further,
        )
    found += _in_modes(
        coupled.whole_groups_are_exact,
        thorough={"eager": "un-jitted JAX compiles every operation for every shape"},
    )
    for name, refusal in refusals.REFUSALS.items():
        feature = "values of weights are refused" if refusal.reads else refusal.feature
        compiled = {"compiled": "refused by what refuses it eagerly, while it is traced"}
        found += _in_modes(refusals.bad_input_is_refused, feature, name, {"name": name}, compiled)
    return found


CASES = _all()


def applies(case: Case, engine: str) -> bool:
    """Whether a case is run on an engine."""
    return (case.feature, engine, case.mode) not in DOES_NOT_APPLY
