"""What a verb returns can be stored as JSON and shown in a notebook."""

import json
import math
from dataclasses import asdict, dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Result:
    """Base of the dataclasses that verbs return; `str()` reads them."""

    def to_json(self) -> str:
        """All fields as one JSON object, in bytes, seconds and rows; what is not finite is null."""
        return json.dumps(_finite(asdict(self)), indent=2)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    # JSON has no such numbers.
    return None if isinstance(value, float) and not math.isfinite(value) else value
