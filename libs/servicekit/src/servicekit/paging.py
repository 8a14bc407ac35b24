"""How long a page of a list is, everywhere the same."""

from __future__ import annotations

from servicekit.errors import Invalid, Violation

DEFAULT = 100
MOST = 1_000


def page_size(asked: int) -> int:
    """The items that a page gets: DEFAULT when the caller does not say (0), never more than MOST. Raises Invalid when negative."""
    if asked < 0:
        raise Invalid("the input is not valid", [Violation("page_size", "0 or more")])
    return min(asked or DEFAULT, MOST)
