"""`virtualbatch demo`: the real runs, once and short; the rest on figures made up."""

import io
import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from virtualbatch.demo import parent, peak_memory
from virtualbatch.demo.parent import ChildFailure, run_child, run_demo
from virtualbatch.demo.peak_memory import PeakMemory
from virtualbatch.demo.result import DemoResult, RunResult, Settings

MEBIBYTE = 2**20
TRAIN_ROWS = 1_437


def run_result(mode: str, **changes: object) -> RunResult:
    figures = RunResult(
        mode=mode,
        updates=36,
        train_loss=0.25,
        test_accuracy=0.9,
        fit_seconds=8.0,
        peak_memory_bytes=200 * MEBIBYTE,
        framework_memory_bytes=700 * MEBIBYTE,
        peak_memory_method="VmHWM",
        farthest_weight=0.1,
        losses=[2.0, 0.5],
        seconds=[4.0, 8.0],
    )
    return replace(figures, **changes)


@pytest.fixture
def result() -> DemoResult:
    return DemoResult(
        settings=Settings(),
        small=run_result("small", updates=540, test_accuracy=0.95, fit_seconds=7.0),
        whole=run_result("whole"),
        accumulated=run_result("accumulated", peak_memory_bytes=50 * MEBIBYTE, fit_seconds=9.0),
        small_difference=0.2,
        accumulated_difference=1e-6,
    )


def test_the_conclusion_is_one_sentence_with_both_sides(result: DemoResult) -> None:
    assert result.conclusion == (
        "Accumulated from micro-batches of 32, the batch of 512 gave the weights of the whole "
        "batch (largest difference 1.0e-06; training moved weights by up to 1.0e-01) in 25% of "
        "its memory and 1.12 times its time; against small batches of 32 it made 36 updates "
        "instead of 540, took 9.0 s instead of 7.0 s and reached 90.0% test accuracy instead of "
        "95.0%: a larger batch is not better by itself."
    )


def test_the_conclusion_says_when_the_weights_differ(result: DemoResult) -> None:
    other = replace(result, accumulated_difference=1e-2)
    assert not other.weights_agree
    assert "did NOT give the weights of the whole batch" in other.conclusion


def test_the_conclusion_says_when_no_memory_was_saved(result: DemoResult) -> None:
    costly = run_result("accumulated", peak_memory_bytes=210 * MEBIBYTE)
    conclusion = replace(result, accumulated=costly).conclusion
    assert "saved no memory here: it took 105% of its memory" in conclusion


def test_the_conclusion_does_not_sell_a_gain_as_a_rule(result: DemoResult) -> None:
    better = run_result("accumulated", test_accuracy=0.99)
    conclusion = replace(result, accumulated=better).conclusion
    assert conclusion.endswith("a gain that a larger batch does not always bring.")


def test_json_holds_all_figures(result: DemoResult) -> None:
    content = json.loads(result.to_json())
    assert content["accumulated"]["peak_memory_bytes"] == 50 * MEBIBYTE
    assert content["accumulated_difference"] == 1e-6
    assert content["accumulated"]["losses"] == [2.0, 0.5]
    assert content["weights_agree"] is True
    assert content["conclusion"] == result.conclusion


def child_program(folder: Path, body: str) -> tuple[str, ...]:
    """A stand-in for the child, which has its mode and the weights' file at hand."""
    program = folder / "child.py"
    program.write_text(
        "import json, sys\nimport numpy as np\n"
        "mode, weights = sys.argv[2], sys.argv[4]\n" + textwrap.dedent(body)
    )
    return (str(program),)


def test_table_and_differences_come_from_the_children(tmp_path: Path) -> None:
    child = child_program(
        tmp_path,
        f"""
        print("a line of the framework's own")
        print(json.dumps({{"event": "epoch", "epoch": 1}}))
        value = {{"small": 3.0, "whole": 1.0, "accumulated": 1.0 + 2**-20}}[mode]
        np.savez(weights, np.zeros((2, 2)), np.array([0.0, value]))
        figures = {run_result("whole").__dict__!r} | {{"mode": mode}}
        print(json.dumps({{"event": "result"}} | figures))
        """,
    )
    console = Console(width=100, record=True, file=io.StringIO())
    result = run_demo(Settings(epochs=1), console, child)
    assert [run.mode for run in result.runs] == ["small", "whole", "accumulated"]
    assert result.small_difference == 2.0
    assert result.accumulated_difference == 2**-20
    screen = console.export_text()
    for text in ("(a) small, 32", "(b) whole, 512", "(c) 512 from 32", "1/1 epochs"):
        assert text in screen
    for text in ("0.2500", "90.0%", "8.0 s", "200 MiB", "2.0e+00", "9.5e-07"):
        assert text in screen
    assert " ".join(result.conclusion.split()) in " ".join(screen.split())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise MemoryError('no room')", r"exit code 1\. Its last lines:\n(.|\n)*no room"),
        ("import os; os.kill(os.getpid(), 9)", r"Got exit code -9\."),
        ("", r'"\(b\) whole, 512" ended without a result\. Got exit code 0\.'),
    ],
)
def test_a_child_that_fails_is_shown(tmp_path: Path, body: str, message: str) -> None:
    child = child_program(tmp_path, body)
    with pytest.raises(ChildFailure, match=message):
        run_child("whole", Settings(), tmp_path / "weights.npz", print, child)


def test_a_child_is_ended_with_its_parent(tmp_path: Path) -> None:
    child = child_program(
        tmp_path,
        """
        import time
        print(json.dumps({"event": "epoch", "epoch": 1}), flush=True)
        time.sleep(600)
        """,
    )

    def interrupt(epoch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("whole", Settings(), tmp_path / "weights.npz", interrupt, child)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "NEEDED", ("tensorflow", "no_such_package"))
    with pytest.raises(ValueError, match=r"Got no no_such_package\. Run: pip install"):
        run_demo(Settings(), Console(quiet=True))


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_what_was_freed_again(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(peak_memory, "kernel_tells_peak", lambda: False)
    measured = PeakMemory()
    block = np.ones(64 * MEBIBYTE, "uint8")
    # Long enough for the sampler to look at least once.
    for _ in range(50):
        block += 1
    del block
    peak = measured.stop()
    assert 60 * MEBIBYTE < peak < 80 * MEBIBYTE
    if not kernel:
        assert measured.method == "sampled RSS"


def test_the_loss_of_a_batch_follows_from_the_mean_that_keras_shows() -> None:
    from virtualbatch.demo.digits import Losses

    kept = Losses(rows=10, batch_size=4)
    kept.on_train_begin()
    for _ in range(2):
        kept.on_epoch_begin(0)
        # Batches of 4, 4 and 2 rows with the losses 3, 1 and 0.5.
        for batch, mean in enumerate((3.0, 2.0, 1.7)):
            kept.on_train_batch_end(batch, {"loss": mean})
    assert kept.losses == pytest.approx([3.0, 1.0, 0.5, 3.0, 1.0, 0.5])
    assert kept.seconds == sorted(kept.seconds)
    assert len(kept.seconds) == 6


@pytest.mark.thorough("three trainings; .ci/run has the same demo")
@pytest.mark.timeout(240)
def test_the_real_runs() -> None:
    settings = Settings(epochs=1)
    console = Console(width=100, record=True, file=io.StringIO())
    result = run_demo(settings, console)
    assert result.small.updates == -(-TRAIN_ROWS // settings.microbatch_size)
    assert result.whole.updates == -(-TRAIN_ROWS // settings.batch_size)
    assert result.accumulated.updates == result.whole.updates
    # The short last batch is one, and its last micro-batch is short as well.
    short = TRAIN_ROWS % settings.batch_size
    assert short % settings.microbatch_size > 0
    assert result.weights_agree
    assert result.small_difference > 100 * result.accumulated_difference
    assert result.accumulated.train_loss == pytest.approx(result.whole.train_loss, rel=1e-4)
    for run in result.runs:
        assert len(run.losses) == len(run.seconds) == run.updates
        assert 0 < run.seconds[0] < run.seconds[-1] <= run.fit_seconds
        # Ten digits and no knowledge: every guess costs log 10.
        assert run.losses[0] == pytest.approx(math.log(10), rel=0.05)
    assert result.accumulated.losses == pytest.approx(result.whole.losses, rel=1e-4)
    assert result.accumulated.peak_memory_bytes < 0.5 * result.whole.peak_memory_bytes
