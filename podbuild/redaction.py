"""Keeping known secrets out of what people read. Pure: text in, text out."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus

#: A shorter secret is not redacted: it would blacken words that are none.
SHORTEST_SECRET = 6


class Redactor:
    """Replaces known secrets by ``***``, in every spelling that tools print them in.

    These are: as they are, percent-encoded, escaped for JSON or a shell, hexadecimal, and base64
    wherever the secret begins in it (so ``user:secret`` is covered). Of a secret with several lines,
    each line is one. Secrets under 6 characters are not redacted.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        single = {line.strip() for secret in secrets for line in secret.splitlines()}
        spellings = {s for secret in single if len(secret) >= SHORTEST_SECRET for s in _spellings(secret)}
        self._spellings = sorted(spellings, key=len, reverse=True)

    def redact(self, text: str) -> str:
        """Return the text without any secret. Text without one comes back as it is."""
        # The replacement may complete another secret, one with asterisks: look again until none is left.
        while spans := sorted(self._find(text)):
            pieces, done = [], 0
            for start, end in spans:
                if start >= done:
                    pieces += [text[done:start], "***"]
                done = max(done, end)
            text = "".join((*pieces, text[done:]))
        return text

    def _find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where secrets are, overlapping ones too: half of a secret may be worth something."""
        for secret in self._spellings:
            start = text.find(secret)
            while start >= 0:
                yield start, start + len(secret)
                start = text.find(secret, start + 1)


def _spellings(secret: str) -> Iterator[str]:
    yield secret
    for encoded in (quote(secret), quote(secret, safe=""), quote_plus(secret)):
        yield encoded
        yield re.sub("%..", lambda found: found[0].lower(), encoded)
    for escaped in (json.dumps(secret), json.dumps(secret, ensure_ascii=False)):
        yield escaped[1:-1]
        yield escaped[1:-1].replace("/", "\\/")
    yield shlex.quote(secret).removeprefix("'").removesuffix("'")
    data = secret.encode()
    yield data.hex()
    yield data.hex().upper()
    for shift in range(3):
        # Only the characters that the secret alone decides: neighbours share the ones at its edges.
        decided = slice(-(-shift * 8 // 6), (shift + len(data)) * 8 // 6)
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(shift) + data)[decided].decode()
