"""When a cron trigger is due. Five fields, as crontab(5) has them, in UTC: minute hour day-of-month month day-of-week."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

LOOK_BACK = timedelta(hours=1)
"""How long after its time a training is still started, when nobody was there at that time."""

_RANGES = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_PART = re.compile(r"(\*|\d{1,4}(?:-\d{1,4})?)(?:/(\d{1,4}))?")


def check_cron(text: str) -> str:
    """What is wrong with a cron expression; "" when nothing is."""
    fields = text.split()
    if len(fields) != len(_RANGES):
        return "five fields are needed: minute hour day month weekday"
    for value, (name, low, high) in zip(fields, _RANGES, strict=True):
        for part in value.split(","):
            match = _PART.fullmatch(part)
            numbers = [int(number) for number in match[1].split("-")] if match and match[1] != "*" else []
            step_wrong = match is not None and match[2] is not None and int(match[2]) == 0
            if not match or step_wrong or any(not low <= n <= high for n in numbers) or numbers != sorted(numbers):
                return f"{part!r} is not a {name} ({low} to {high}, *, a-b, */n, several with commas)"
    return ""


def last_due(cron: str, after: datetime, until: datetime) -> datetime | None:
    """The last minute in (after, until] at which a right expression is due, but none longer ago than LOOK_BACK. Times are UTC."""
    minutes, hours, days, months, weekdays = (
        _numbers(value, low, high) for value, (_, low, high) in zip(cron.split(), _RANGES, strict=True)
    )
    any_day, any_weekday = (cron.split()[field].startswith("*") for field in (2, 4))
    minute = until.replace(second=0, microsecond=0)
    while minute > after and minute > until - LOOK_BACK:
        weekday = minute.isoweekday() % 7
        on_day, on_weekday = minute.day in days, weekday in weekdays or (weekday == 0 and 7 in weekdays)
        # crontab(5): when both are restricted, either will do.
        today = (on_day and on_weekday) if any_day or any_weekday else (on_day or on_weekday)
        if today and minute.minute in minutes and minute.hour in hours and minute.month in months:
            return minute
        minute -= timedelta(minutes=1)
    return None


def _numbers(field: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = (f"{low}-{high}" if span == "*" else span).partition("-")
        # With a step, a single number begins a range that goes to the end.
        end = int(last) if last else (high if step else int(first))
        found.update(range(int(first), end + 1, int(step or 1)))
    return frozenset(found)
