"""What the gateway asks of a browser before it believes that its user meant a request: own hosts, own pages, and no frame around them.

A browser sends its cookies with whatever any page makes it ask. So a request that is signed in by a cookie has to come from a page of
this very host. Facts: the Fetch Metadata and Origin headers of https://www.w3.org/TR/fetch-metadata/ and RFC 6454.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from servicekit.errors import Forbidden, Invalid

SAFE = frozenset({"GET", "HEAD"})

HEADERS = {
    "x-frame-options": "SAMEORIGIN",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer that a browser gets: no other site may frame it, embed it or have it guessed to be a script."""


@dataclass(frozen=True, slots=True)
class Site:
    """The gateway as one request named it: the origins that its own pages have, and whether that is https for certain."""

    origins: frozenset[str]
    https: bool


class Hosts:
    """The names by which browsers may reach the gateway: those of its public addresses, IP addresses, and localhost.

    Any other name could be another site's, whose owner has pointed it here to read with the user's browser (DNS rebinding).
    """

    def __init__(self, public_urls: str) -> None:
        """`public_urls`: `https://host[:port]`, separated by commas. Raises ValueError for what is not one."""
        self._public: dict[str, str] = {}
        for url in filter(None, (part.strip() for part in public_urls.split(","))):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query or "@" in url:
                raise ValueError(f"{url!r} is not an address like https://headrace.example.org")
            self._public[parts.netloc.lower()] = parts.scheme

    def site(self, headers: Mapping[str, str]) -> Site:
        """Raises Forbidden for a host that is not ours."""
        host = headers.get("host", "").lower()
        scheme = self._public.get(host)
        if scheme is not None:
            return Site(frozenset({f"{scheme}://{host}"}), scheme == "https")
        if not _is_nobodys(host):
            raise Forbidden(f"{host[:100]!r} is not a name of this server: HEADRACE_PUBLIC_URLS lists those that browsers may use")
        # Which of the two it is stands before the proxy, if there is one.
        origins = frozenset({f"http://{host}", f"https://{host}"})
        return Site(origins, headers.get("origin", "").lower() == f"https://{host}")


def check(site: Site, method: str, headers: Mapping[str, str]) -> None:
    """Raises Forbidden unless a page of this site asks, or the user themselves goes there."""
    origin, fetched = headers.get("origin"), headers.get("sec-fetch-site")
    if method in SAFE:
        if fetched in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            raise Forbidden("another site asks for this")
        return
    if origin is None and fetched is None:
        raise Forbidden("a change needs the header Origin or Sec-Fetch-Site; a program shows its API key instead of a cookie")
    if origin is not None and origin.lower() not in site.origins:
        raise Forbidden("another site asks for this")
    if fetched not in (None, "same-origin"):
        raise Forbidden("another site asks for this")


def check_json(method: str, headers: Mapping[str, str]) -> None:
    """Raises Invalid for a change that is not written as JSON. What else a form or a script may send, it may send without asking first."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method not in SAFE and kind != "application/json":
        raise Invalid(f"the content type must be application/json, not {kind[:100] or 'missing'}")


def _is_nobodys(host: str) -> bool:
    """Whether this host, with or without a port, is an address or localhost: such a name cannot be pointed elsewhere."""
    name = urlsplit(f"//{host}").hostname if host.isascii() and not set(host) & set("@/?#\\") else None
    if not name:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
