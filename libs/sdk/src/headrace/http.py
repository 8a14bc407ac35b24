"""The one HTTP client that SDK and command line share: authentication, retries where they are safe, and errors a person can act on."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from headrace.config import Connection, NotConfigured, connection, proxy

Json = dict[str, Any]

PATIENCE_S = 5.0
"""For so long a call that may be repeated is repeated; a training script has more patience."""

_RETRIED_STATUS = frozenset({429, 502, 503, 504})


class HeadraceError(Exception):
    """Something went wrong, in one sentence. `exit_code` is what the command line ends with."""

    exit_code = 1


class InvalidInput(HeadraceError):
    """The request can never succeed as it is. `violations` name fields and lines."""

    exit_code = 2

    def __init__(self, message: str, *, code: str = "INVALID", violations: tuple[Json, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.violations = violations


class Unreachable(HeadraceError):
    """The gateway or something behind it is not answering now; the same call may succeed later."""

    exit_code = 3


class Denied(HeadraceError):
    """The key is missing, unknown, or may not do this."""

    exit_code = 4


class Client:
    """Blocking client of a gateway's /api/v1. Safe to use from several threads.

    A request is repeated after a connection error, 429, 502, 503 or 504, for `patience_s` seconds, when it is a GET or carries
    `request_id` (or is one of the calls whose contract says that they may be repeated: `repeatable=True`).
    """

    def __init__(self, target: Connection | None = None, *, timeout_s: float = 30.0, patience_s: float = PATIENCE_S) -> None:
        try:
            self.target = target or connection()
        except NotConfigured as error:
            raise InvalidInput(str(error), code="NOT_CONFIGURED") from None
        self.patience_s = patience_s
        self._http = httpx.Client(
            base_url=self.target.url,
            headers={"authorization": f"Bearer {self.target.token}"},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            proxy=proxy(),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, **params: Any) -> Json:
        """GET; query parameters that are None are left out. Repeatable."""
        return self._json("GET", path, params={k: v for k, v in params.items() if v is not None}, repeatable=True)

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, repeatable: bool = False) -> Json:
        """POST a JSON object."""
        return self._json("POST", path, body=body or {}, repeatable=repeatable or bool(body and body.get("request_id")))

    def put(self, path: str, body: Mapping[str, Any]) -> Json:
        return self._json("PUT", path, body=body, repeatable=True)

    def patch(self, path: str, body: Mapping[str, Any]) -> Json:
        """PATCH a JSON object. Repeatable: what a PATCH says here is how things are to be."""
        return self._json("PATCH", path, body=body, repeatable=True)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path, repeatable=True)

    def lines(self, path: str, **params: Any) -> Iterator[str]:
        """Streams a text answer line by line for as long as the server sends."""
        try:
            with self._http.stream(
                "GET", path, params={k: v for k, v in params.items() if v is not None}, timeout=httpx.Timeout(None, connect=5.0)
            ) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    _raise(answer)
                yield from answer.iter_lines()
        except httpx.TransportError as error:
            raise Unreachable(f"the connection to {self.target.url} was lost: {error}") from error

    def send_file(self, path: str, file: Path) -> None:
        """PUTs a file as a body, in constant memory. Repeatable; tried once."""
        with file.open("rb") as opened:
            headers = {"content-length": str(os.fstat(opened.fileno()).st_size), "content-type": "application/octet-stream"}
            try:
                answer = self._http.put(path, content=_pieces(opened), headers=headers, timeout=httpx.Timeout(300.0, connect=5.0))
            except httpx.TransportError as error:
                raise self._silent(error) from error
        if answer.status_code >= 400:
            _raise(answer)

    def fetch_file(self, path: str, file: Path) -> None:
        """GETs what is at `path` into a new file, in constant memory. A broken transfer leaves part of a file."""
        try:
            with file.open("xb") as opened, self._http.stream("GET", path, timeout=httpx.Timeout(300.0, connect=5.0)) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    _raise(answer)
                for piece in answer.iter_bytes(1 << 20):
                    opened.write(piece)
        except httpx.TransportError as error:
            raise Unreachable(f"the connection to {self.target.url} was lost: {error}") from error

    def raw(self, method: str, path: str, *, content: bytes | None = None, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """One request as it is; the caller looks at the answer. Never repeated."""
        try:
            return self._http.request(method, path, content=content, headers=dict(headers or {}))
        except httpx.TransportError as error:
            raise self._silent(error) from error

    def _silent(self, error: httpx.TransportError) -> Unreachable:
        advice = "is it running? `headrace status` tells, `headrace up` starts a local one"
        return Unreachable(f"{self.target.url} does not answer ({error}); {advice}")

    def _json(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        repeatable: bool = False,
    ) -> Json:
        deadline = time.monotonic() + self.patience_s
        for attempt in itertools.count():
            last = not repeatable or time.monotonic() > deadline
            try:
                answer = self._http.request(method, path, params=params, json=body)
            except httpx.TransportError as error:
                if last:
                    raise self._silent(error) from error
            else:
                if answer.status_code < 400:
                    return dict(answer.json()) if answer.content else {}
                if answer.status_code not in _RETRIED_STATUS or last:
                    _raise(answer)
            time.sleep(pause(attempt))
        raise AssertionError("unreachable: the loop ends by returning or raising")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(1 << 20):
        yield piece


def pause(attempt: int) -> float:
    """Seconds between attempt number `attempt`, from 0 on, and the next: from 0.2 to 4, and some less at random."""
    return float(min(4.0, 0.2 * 2 ** min(attempt, 6)) * (0.5 + random.random() / 2))  # noqa: S311 - jitter, not a secret


def _raise(answer: httpx.Response) -> None:
    """Turns an error answer into the exception of its kind."""
    try:
        told = answer.json()
        # MLflow's API has its code and message at the top.
        error = {"message": told["message"], "code": told["error_code"]} if "error_code" in told else told["error"]
        if isinstance(error, str):  # the Open Inference Protocol's form
            error = {"message": error}
        message, code = str(error.get("message", "")), str(error.get("code", ""))
        violations = tuple(error.get("violations", ()))
        if (error_id := str(error.get("error_id", ""))) not in message:  # by which an operator finds the rest in the log
            message += f" (error {error_id})"
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, violations = answer.text[:300] or answer.reason_phrase, "", ()
    if answer.status_code in (401, 403):
        raise Denied(message or "the key was not accepted")
    if answer.status_code in _RETRIED_STATUS:
        raise Unreachable(message or f"the gateway answered {answer.status_code}")
    if answer.status_code < 500:
        raise InvalidInput(message or f"the gateway answered {answer.status_code}", code=code, violations=violations)
    raise HeadraceError(message or f"the gateway answered {answer.status_code}")
