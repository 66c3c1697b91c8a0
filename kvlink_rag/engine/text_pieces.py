"""Token ids to pieces of valid Unicode that never split a stop string. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextPieces:
    """Token ids in, pieces of text out: valid Unicode at every step, no stop string, not half one.

    decode: token ids to text, U+FFFD where bytes are not whole yet.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0
        self._held = ""
        self.stopped = False
        self.visible = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, often ""."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._read])
        after = self._decode(self._ids[self._context :])
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The text still held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._read])
        rest = self._decode(self._ids[self._context :])[len(before) :]
        piece = self._release(rest)
        piece, self._held = piece + self._held, ""
        return piece

    def _release(self, text: str) -> str:
        """Pass on `text` up to a stop string, holding back what may begin one."""
        text = self._held + text
        self.visible = self.visible or bool(text.strip())
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
