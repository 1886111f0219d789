"""Stop strings in streamed text: nothing of one is ever emitted, even when it spans tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through, holding back what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be emitted now, whether a stop string is complete; nothing may be pushed after that)."""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            # The first to be complete ends the text, as it would have if each character had come alone.
            self._held = ""
            return text[: min(found)[1]], True
        keep = len(text) - self._open_end(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` that begins some stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
