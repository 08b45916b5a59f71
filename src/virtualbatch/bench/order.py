"""What a parent tells its child to do, as JSON on both sides."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from virtualbatch.bench.case import Case

# Frameworks print too; the line that starts so is ours.
RESULT = "virtualbatch bench: "


@dataclass(frozen=True)
class Order:
    """What a child is to do.

    Args:
        cases: of one engine. Contenders of all of them take turns.
        peers: `ALL_PEERS`, or the names of those that take part beside ours as it is by default,
            the floor and the uncut batch.
        rounds: turns of each contender.
        seconds_per_turn: how long one turn is, about.
        peak_of: name of a contender whose memory is measured in the first case; nothing is timed.
    """

    cases: Sequence[Case]
    peers: str | Sequence[str]
    rounds: int
    seconds_per_turn: float
    peak_of: str | None = None

    def to_json(self) -> str:
        """As text for the child."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Order":
        """The order that a parent wrote."""
        given = json.loads(text)
        return cls(**given | {"cases": [Case(**case) for case in given["cases"]]})
