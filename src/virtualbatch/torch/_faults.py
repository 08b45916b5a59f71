"""Faults of a loss function that make accumulation impossible, as an error and as a finding."""

from virtualbatch.certify.certificate import Finding

_SHARED_GRAPH = "Trying to backward through the graph a second time"


class StatefulLossError(ValueError):
    """A loss function keeps or changes something besides what it returns.

    Args:
        rule: a sentence.
        got: what was seen, without a full stop.
        fix: a sentence.

    Attributes:
        finding: the fault as a finding for a certificate.
    """

    def __init__(self, rule: str, got: str, fix: str):
        super().__init__(f"{rule} Got {got}. {fix} See docs/guides/state.md.")
        self.finding = Finding("stateful", "loss_fn", f"{rule} It has {got}.", fix)


def refuse_shared_graph(error: RuntimeError) -> None:
    """Raises our own error if a backward pass met a graph that is used up, else does nothing.

    PyTorch advises `retain_graph`, which differentiates the shared part again in each micro-batch.

    Args:
        error: what the backward pass raised.

    Raises:
        StatefulLossError: the error says that the graph is used up.
    """
    if _SHARED_GRAPH in str(error):
        raise StatefulLossError(
            "A micro-batch must have a graph of its own.",
            "a graph that an earlier backward pass has used up, because something was computed "
            "outside loss_fn or kept from an earlier call of it",
            "Compute it inside loss_fn, or detach() it; do not retain the graph.",
        ) from error
