"""The order from a parent to its child, passed as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from virtualbatch.bench.case import Case


@dataclass(frozen=True)
class Order:
    """The work of a child process.

    Args:
        cases: cases of one engine. The contenders of all cases are timed in the same rounds.
        peers: `ALL_PEERS`, or the names of the peers. Our default way, the floor and the uncut
            batch always take part.
        rounds: number of rounds.
        seconds_per_round: approximate time that a contender trains in a round.
        peak_of: the name of a contender whose memory is measured in the first case. If given,
            nothing is timed.
    """

    cases: Sequence[Case]
    peers: str | Sequence[str]
    rounds: int = 0
    seconds_per_round: float = 0.0
    peak_of: str | None = None

    def to_json(self) -> str:
        """The order as text for the child."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """The order that a parent wrote."""
        given = json.loads(text)
        return cls(**given | {"cases": [Case(**case) for case in given["cases"]]})
