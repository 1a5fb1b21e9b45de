"""Ending a text before a stop string, while it is still being written.

The text ends at the first character that completes a stop string, and is cut where that string begins; where two are
completed by the same character, at the longer one. So the result depends on the text alone, not on the pieces it came in.
What could be the beginning of a stop string is held back until the next characters decide.
"""

from __future__ import annotations

from collections.abc import Iterable

from nybble.errors import UsageError


class StopStrings:
    """Passes pieces of a text on, up to the first stop string."""

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises UsageError for an empty stop string: it would end every text at once."""
        self._stops = tuple(dict.fromkeys(stops))
        if "" in self._stops:
            raise UsageError("a stop string is empty, which would end every text before it begins; leave it out")
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the text; None as long as none has."""

    def feed(self, piece: str) -> str:
        """The text that can go out after this piece; nothing once a stop string has ended it."""
        if self.stopped_by is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        out = len(text) - self._beginning(text)
        self._held = text[out:]
        return text[:out]

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
