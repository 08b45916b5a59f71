"""What a window needs at its peak: the most of its runs."""

from virtualbatch.tensorflow._plan.peak import Watched


class Peaks:
    """Stands for what measures: each run has the next of some peaks."""

    def __init__(self, peaks):
        self._left = iter(peaks)

    def of(self, run):
        return max(self.beside(run)[1] for _ in range(2))

    def beside(self, run):
        return run(), next(self._left)


def test_runs_that_are_timed_are_looked_at_too():
    seconds = iter([9.0, *[0.2] * 10])
    found = Watched(lambda: next(seconds), Peaks([5, 7, 30, 6]))
    assert found.peak_bytes() == 7
    # The runs of the peak gave a time already.
    assert found.timing.seconds() == 0.2
    assert found.peak_bytes() == 7
    assert found.timing.seconds() == 0.2
    assert found.peak_bytes() == 30
    assert found.timing.seconds() == 0.2
    assert found.peak_bytes() == 30


def test_a_peak_of_nothing_is_measured_once():
    runs = []

    def run():
        runs.append(None)
        return 0.2

    found = Watched(run, Peaks([0] * 9))
    assert [found.peak_bytes(), found.peak_bytes()] == [0, 0]
    # The first run of a graph is left out, and two gave the peak.
    assert len(runs) == 3
