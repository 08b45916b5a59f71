"""What a parent tells its child to do, as JSON on both sides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from virtualbatch.bench.case import Case


@dataclass(frozen=True)
class Order:
    """What a child is to do.

    Args:
        cases: of one engine. Contenders of all of them are timed in the same rounds.
        peers: `ALL_PEERS`, or the names of those that take part beside ours as it is by default,
            the floor and the uncut batch.
        rounds: in how many each contender is timed.
        seconds_per_round: how long a contender trains in a round, about.
        peak_of: name of a contender whose memory is measured in the first case; nothing is timed.
    """

    cases: Sequence[Case]
    peers: str | Sequence[str]
    rounds: int = 0
    seconds_per_round: float = 0.0
    peak_of: str | None = None

    def to_json(self) -> str:
        """As text for the child."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """The order that a parent wrote."""
        given = json.loads(text)
        return cls(**given | {"cases": [Case(**case) for case in given["cases"]]})
