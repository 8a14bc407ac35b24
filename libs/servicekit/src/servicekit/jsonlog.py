"""Log records as JSON lines with the ids of the trace they belong to; what looks like a secret is blotted out."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime

from opentelemetry import trace

# The second line of defence: settings hold secrets as SecretStr, and nothing logs a header. The keys and tokens of access.py and
# runtoken.py, what follows `Bearer`, and the password within a URL.
_SECRETS = re.compile(
    r"(\bhrr?_[A-Za-z0-9]{8,}?)[A-Za-z0-9_.\-]{8,}"
    r"|(\b[Bb]earer\s+)[A-Za-z0-9._~+/=\-]{16,}"
    r"|(://[^\s/:@\"\\]*:)[^\s/@\"\\]+(?=@)"
)

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ts, level, logger, msg, service, the ids of the current span, what `extra` holds, the stack."""

    def __init__(self, service_name: str) -> None:
        super().__init__()
        self._service_name = service_name

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "msg": record.getMessage(),
            "service": self._service_name,
        }
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = f"{span.trace_id:032x}"
            line["span_id"] = f"{span.span_id:016x}"
        for key, value in record.__dict__.items():
            if key not in _STANDARD and key not in line:
                line[key] = value
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack_info"] = record.stack_info
        return redact(json.dumps(line, ensure_ascii=False, default=str))


class Seldom(logging.Filter):
    """Lets the same message of the loggers below `prefix` pass once in `seconds`: for what complains of every failed attempt."""

    def __init__(self, prefix: str, seconds: float = 60) -> None:
        super().__init__()
        self._prefix = prefix
        self._seconds = seconds
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self._prefix):
            return True
        key = (record.name, str(record.msg))
        if record.created - self._last.get(key, 0.0) < self._seconds:
            return False
        self._last[key] = record.created
        return True


def redact(text: str) -> str:
    """The text without API keys, run tokens, bearer tokens and passwords in URLs."""
    return _SECRETS.sub(lambda match: f"{match[1] or match[2] or match[3]}[redacted]", text)
