"""NoiseScale: unbiased for any cut, intervals that cover, and nothing that is not finite."""

import json
import math

import numpy as np
import pytest

from virtualbatch import NoiseScale, WindowStats

FEATURES, NOISE, SIGNAL = 20, 300.0, 3.0


def windows(cut, count, seed=0):
    """Statistics of windows whose rows have gradients of known mean and covariance."""
    rng = np.random.default_rng(seed)
    mean = np.zeros(FEATURES)
    mean[0] = math.sqrt(SIGNAL)
    deviations = np.sqrt(NOISE * np.arange(1, FEATURES + 1) / np.arange(1, FEATURES + 1).sum())
    rows, shares = sum(cut), np.array(cut) / sum(cut)
    for _ in range(count):
        # The mean of so many rows, drawn as one.
        noise = rng.normal(size=(len(cut), FEATURES)) / np.sqrt(np.array(cut))[:, None]
        gradients = mean + deviations * noise
        whole = shares @ gradients
        yield WindowStats(rows, len(cut), shares @ (gradients**2).sum(1), whole @ whole)


@pytest.mark.parametrize("cut", [[32] * 8, [32, 32, 32, 4], [1, 2, 3, 50], [5, 90]])
def test_noise_and_signal_are_unbiased(cut):
    found = NoiseScale(decay=1.0)
    for stats in windows(cut, 20_000):
        found.update(stats)
    estimate = found.estimate()
    assert estimate.windows == 20_000
    assert estimate.noise == pytest.approx(NOISE, rel=0.02)
    assert estimate.signal == pytest.approx(SIGNAL, rel=0.05)
    assert estimate.low < NOISE / SIGNAL < estimate.high


def test_the_mean_of_ratios_would_be_wrong():
    # What the class does instead, and why: single windows scatter around a small signal.
    ratios = []
    for stats in windows([8] * 8, 20_000):
        noise = stats.rows * (stats.mean_square - stats.square) / (stats.microbatches - 1)
        ratios.append(noise / (stats.square - noise / stats.rows))
    assert abs(np.mean(ratios) - NOISE / SIGNAL) > 0.1 * NOISE / SIGNAL


@pytest.mark.parametrize("cut", [[32] * 8, [64, 16, 4]])
def test_the_interval_covers_as_often_as_it_says(cut):
    covered = 0
    for seed in range(300):
        found = NoiseScale(decay=1.0)
        for stats in windows(cut, 50, seed):
            found.update(stats)
        estimate = found.estimate(confidence=0.9)
        covered += estimate.low <= NOISE / SIGNAL <= estimate.high
    assert 0.84 < covered / 300 < 0.95


def test_the_average_follows_what_drifts():
    found = NoiseScale(decay=0.9)
    for _ in range(100):
        found.update(WindowStats(64, 4, 3.0, 1.0))
    for _ in range(100):
        found.update(WindowStats(64, 4, 30.0, 1.5))
    last = NoiseScale()
    last.update(WindowStats(64, 4, 30.0, 1.5))
    assert found.estimate().noise == pytest.approx(last.estimate().noise, rel=1e-3)


def test_windows_that_tell_nothing_are_left_out():
    found = NoiseScale()
    found.update(WindowStats(64, 1, 1.0, 1.0))
    found.update(WindowStats(64, 4, math.inf, math.inf))
    found.update(WindowStats(64, 4, math.nan, 1.0))
    assert found.windows == 0
    assert str(found) == "noise scale: no window counted yet"
    with pytest.raises(ValueError, match="Got none so far"):
        found.estimate()
    found.update(WindowStats(64, 4, 3.0, 1.0))
    assert found.windows == 1


def test_without_signal_the_scale_is_infinite():
    found = NoiseScale()
    for _ in range(5):
        found.update(WindowStats(64, 4, 4.0, 0.5))
    estimate = found.estimate()
    assert estimate.signal < 0
    assert estimate.scale == math.inf
    assert "infinitely many" in str(estimate)
    assert json.loads(estimate.to_json())["scale"] is None
    assert "No signal" in found.advice(seconds_per_row=1.0, seconds_per_update=1.0).verdict


def test_few_windows_have_no_interval():
    found = NoiseScale()
    found.update(WindowStats(64, 4, 3.0, 1.0))
    assert (found.estimate().low, found.estimate().high) == (0.0, math.inf)


def test_numbers_are_read_when_they_are_asked_for():
    read = []

    class Waiting:
        def __float__(self):
            read.append(1)
            return 2.0

    found = NoiseScale()
    found.update(WindowStats(64, 4, Waiting(), 1.0))
    assert not read
    assert found.windows == 1
    assert len(read) == 1


@pytest.mark.parametrize("decay", [0, -1, 1.5, math.nan])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match="decay must be above 0"):
        NoiseScale(decay)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_checked(confidence):
    found = NoiseScale()
    with pytest.raises(ValueError, match="confidence must be between"):
        found.estimate(confidence)


def test_it_shows_what_it_was_made_with_and_reads_no_window():
    found = NoiseScale(decay=0.9)
    found.update(WindowStats(64, 4, object(), object()))
    assert repr(found) == "NoiseScale(decay=0.9)"
