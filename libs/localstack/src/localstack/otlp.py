"""A small OTLP/HTTP receiver that keeps spans, and answers which belong together: `python -m localstack.otlp --port P --database FILE`.

POST /v1/traces takes protobuf and JSON, gzipped or not, from anybody on this machine; /v1/metrics and /v1/logs are accepted and dropped.
GET /spans?trace_id=T, or by an attribute without its `headrace.` (request_id=R, run_id=R), needs `Authorization: Bearer SECRET`.
"""

from __future__ import annotations

import argparse
import gzip
import hmac
import http.server
import json
import os
import signal
import threading
import zlib
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from localstack import tree
from localstack.otlp_decode import Malformed, decode_json, decode_protobuf
from localstack.ports import LOOPBACK
from localstack.span_store import INDEXED_PREFIX, SpanStore

SECRET_VARIABLE = "HEADRACE_TRACES_SECRET"  # noqa: S105 - a variable's name
_LARGEST_BODY = 64 * 1024 * 1024


class Receiver(http.server.ThreadingHTTPServer):
    """The server; a thread per connection, as exporters keep theirs open."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], store: SpanStore, secret: str) -> None:
        super().__init__(address, _Handler)
        self.store = store
        self.secret = secret
        self.received = 0

    def query(self, name: str, value: str) -> dict[str, Any]:
        """The spans that belong to a trace, or to the traces with an attribute, and the causal tree of them."""
        traces = [value.lower()] if name == "trace_id" else self.store.traces_with(INDEXED_PREFIX + name, value)
        found = self.store.connected(traces)
        return {
            "traces": traces,
            "truncated": found.truncated,
            "spans": [span.as_dict() for span in found.spans],
            "tree": [root.as_dict() for root in tree.build(found.spans)],
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self._body()
        if body is None:
            return
        kind = self.headers.get_content_type()
        if self.path in ("/v1/metrics", "/v1/logs"):
            self._accept(kind)
            return
        if self.path != "/v1/traces":
            self._error(HTTPStatus.NOT_FOUND, f"no such path: {self.path}")
            return
        try:
            spans = decode_json(body) if kind == "application/json" else decode_protobuf(body)
        except Malformed as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
            return
        self.server.store.add(spans)
        self.server.received += len(spans)
        self._accept(kind)

    def do_GET(self) -> None:
        secret = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            self._error(HTTPStatus.UNAUTHORIZED, "spans are shown for `Authorization: Bearer SECRET` only")
            return
        url = urlsplit(self.path)
        parameters = [(name, values[0]) for name, values in parse_qs(url.query).items()]
        if url.path != "/spans" or len(parameters) != 1:
            self._error(HTTPStatus.NOT_FOUND, "ask for /spans?trace_id=T or /spans?request_id=R")
            return
        self._answer(HTTPStatus.OK, json.dumps(self.server.query(*parameters[0])).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: every request would be a line."""

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LARGEST_BODY:
            self.close_connection = True
            self._error(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length.isdecimal() else HTTPStatus.LENGTH_REQUIRED, "no usable Content-Length"
            )
            return None
        body = self.rfile.read(int(length))
        try:
            match self.headers.get("Content-Encoding", "identity"):
                case "gzip":
                    return gzip.decompress(body)
                case "deflate":
                    return zlib.decompress(body)
                case _:
                    return body
        except (OSError, EOFError, zlib.error):
            self._error(HTTPStatus.BAD_REQUEST, "the body is not compressed as its header says")
            return None

    def _accept(self, kind: str) -> None:
        """An empty response message, in the encoding of the request."""
        if kind == "application/json":
            self._answer(HTTPStatus.OK, b"{}")
        else:
            self._answer(HTTPStatus.OK, b"", "application/x-protobuf")

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._answer(status, json.dumps({"message": message}).encode())

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m localstack.otlp")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database", type=Path, required=True)
    arguments = parser.parse_args()
    store = SpanStore(arguments.database)
    server = Receiver((LOOPBACK, arguments.port), store, os.environ[SECRET_VARIABLE])

    def stop(*_: object) -> None:
        # serve_forever runs in this thread: shutdown must not.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.serve_forever(poll_interval=0.2)
    store.close()


if __name__ == "__main__":
    main()
