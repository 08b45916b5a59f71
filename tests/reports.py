"""Results to report on: made up, with what real ones hold."""

import math

from virtualbatch.certify.certificate import Certificate, Finding
from virtualbatch.demo.result import DemoResult, RunResult, Settings
from virtualbatch.noise.advice import Advice, advice
from virtualbatch.noise.estimate import NoiseEstimate
from virtualbatch.plan.plan import Plan, PlanRow

MEBIBYTE = 2**20

# A name may come from anywhere; this one would run, be typeset, or break the file.
HOSTILE = "<script>alert('x')</script>\n&amp; \"$\\frac{a}{b}$\" \x00\x1b 日本 ]]>"


def plan() -> Plan:
    rows = tuple(
        PlanRow(size, int((60 + 1.9 * size) * MEBIBYTE), measured, seconds)
        for size, measured, seconds in (
            (4, False, 1.9),
            (8, True, 1.21),
            (16, False, 0.92),
            (32, True, 0.80),
            (64, False, 0.77),
            (104, True, 0.79),
            (208, True, None),
        )
    )
    reason = "104 rows fit at once; 32 is the smallest size measured within 2% of the fastest, 64."
    return Plan(32, 8, 300 * MEBIBYTE, reason, rows)


def certificate(layers: int = 6) -> Certificate:
    parameters = {
        f"encoder/block_{layer}/{name}": 10.0 ** -(14.2 + layer % 30 / 10)
        for layer in range(layers)
        for name in ("kernel", "bias")
    }
    notes = ("Compared in float64, with the same dropout masks.",)
    return Certificate(True, max(parameters.values()), 1.4e-13, parameters, (), 1e-16, notes)


def inexact() -> Certificate:
    return Certificate(
        exact=False,
        max_error=math.inf,
        tolerance=1.4e-13,
        parameters={
            "embedding.weight": 2e-16,
            f"{HOSTILE}.weight": 0.31,
            "head.bias": 0.0,
            "scale": math.inf,
        },
        findings=(
            Finding(
                "weight",
                "train.py:41 (cross_entropy)",
                "Means of micro-batches were averaged by rows, and the loss divides by tokens.",
                "Pass weight=lambda batch: (batch[:, 1:] != 0).sum().",
            ),
            Finding("batchnorm", HOSTILE, "It normalises a micro-batch alone.", "Use GroupNorm."),
        ),
        loss_error=0.02,
        notes=("Compared in float64.",),
    )


def run(mode: str, updates: int, seconds: float, peak: int) -> RunResult:
    return RunResult(
        mode=mode,
        updates=updates,
        train_loss=0.1831,
        test_accuracy=0.947,
        fit_seconds=seconds,
        peak_memory_bytes=peak * MEBIBYTE,
        framework_memory_bytes=700 * MEBIBYTE,
        peak_memory_method="VmHWM",
        farthest_weight=0.065,
        losses=[
            2.3 * math.exp(-10 * k / updates * (1 + 0.3 * math.sin(k))) for k in range(updates)
        ],
        seconds=[0.8 + (seconds - 0.8) * (k + 1) / updates for k in range(updates)],
    )


def demo() -> DemoResult:
    return DemoResult(
        settings=Settings(),
        small=run("small", 450, 5.4, 39),
        whole=run("whole", 30, 4.7, 257),
        accumulated=run("accumulated", 30, 5.1, 52),
        small_difference=0.45,
        accumulated_difference=3.8e-7,
    )


def noise() -> list[tuple[int, NoiseEstimate]]:
    estimates = [NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 1.0, -0.1, 1)]
    for windows in range(2, 61):
        scale = 40 * windows**0.7
        spread = 1 + 3 / windows
        high = math.inf if windows < 4 else scale * spread
        estimates.append(NoiseEstimate(scale, scale / spread, high, 0.95, scale, 1.0, windows))
    return [(10 * estimate.windows, estimate) for estimate in estimates]


def batch_advice() -> Advice:
    return advice(
        1000.0,
        (800.0, 1250.0),
        rows=1024,
        microbatch_size=32,
        seconds_per_row=0.001,
        seconds_per_update=0.008,
    )
