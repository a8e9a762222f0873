"""Web addresses that a server gave us: which of them we follow, and when two are the same server. Pure."""

from __future__ import annotations

import httpx


def usable_url(text: str, base: httpx.URL | None = None) -> httpx.URL | None:
    """Return an address, or None if it is not one of a plain web server."""
    try:
        url = base.join(text) if base else httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        return None
    plain = url.scheme in ("http", "https") and url.host and not url.userinfo
    # A port that no socket has would come back from below as an error of another kind.
    return url if plain and (url.port or 0) < 65536 else None


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    """Return what must be equal for credentials to be sent: scheme, host and port."""
    return url.scheme, url.host, url.port
