"""The life of a process: its components start in order, it says that it is ready, and it stops in reverse order when told to."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from servicekit.http import AsgiApp, HttpServer
from servicekit.settings import ServiceSettings

ANNOUNCE_VARIABLE = "HEADRACE_ANNOUNCE_FILE"
"""Environment variable that names the file into which the ports are written."""

# However short the grace period has become, each component gets this much to let go of what it holds.
_LEAST_STOP_S = 0.5

_log = logging.getLogger("servicekit.lifecycle")


class Component(Protocol):
    """A part of a process with a life of its own.

    It may also have `ready() -> str | None` (None: ready, else the reason why not), `async wait()` (raises when its background
    work has failed), `listening() -> Mapping[str, int]` (ports by name), `http: AsgiApp` (what it serves on the HTTP address, beside the
    health of the process; one component at most) and `name: str`; those it has are used.
    """

    async def start(self) -> object:
        """Begins the work and returns (a server its port; not used here); raises when it cannot."""
        ...

    async def stop(self) -> None:
        """Ends the work, or hands it back, and returns."""
        ...


class Closing:
    """Lets go, at the stop, of what the other components use: engines, channels, brokers. It stands first, so that it is stopped last."""

    name = "closing"

    def __init__(self, *closes: Callable[[], Awaitable[object]]) -> None:
        """`closes` are called one after the other, in this order."""
        self._closes = closes

    async def start(self) -> None:
        """Nothing to do: connections are made at first use."""

    async def stop(self) -> None:
        """Calls them all; raises an ExceptionGroup of what those raised that failed."""
        errors: list[Exception] = []
        for close in self._closes:
            try:
                await close()
            except Exception as error:  # the others must be let go all the same
                errors.append(error)
        if errors:
            raise ExceptionGroup("could not be let go", errors)


class LoadedHeap:
    """What has been loaded by the end of the start stays: full collections need not walk it, and each would halt every request for
    some 100 ms. It stands before the servers, after what they use."""

    name = "loaded heap"

    async def start(self) -> None:
        """Takes what there is out of later collections."""
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        """Puts it back."""
        gc.unfreeze()


class Readiness:
    """What `/readyz` answers: the reasons of the components that are not ready, and of the process as a whole."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = list(zip(names(components), components, strict=True))
        self.phase: str | None = "starting"

    def reasons(self) -> dict[str, str]:
        """{component: reason} of all that is not ready; empty when the process is."""
        found = {"process": self.phase} if self.phase is not None else {}
        for name, component in self._components:
            ready = getattr(component, "ready", None)
            if ready is None:
                continue
            try:
                reason = ready()
            except Exception as error:  # a component that cannot tell is not ready
                _log.exception("ready() of %s failed", name)
                reason = f"cannot tell: {type(error).__name__}"
            if reason is not None:
                found[name] = str(reason)
        return found

    def app(self) -> AsgiApp:
        """`/healthz`: 200 while the process lives. `/readyz`: 200, or 503 with the reasons by component. All else is the component's that
        serves HTTP; when there is none, 404. Raises ValueError when there are two."""

        async def healthz(request: Request) -> Response:
            return JSONResponse({"alive": True})

        async def readyz(request: Request) -> Response:
            reasons = self.reasons()
            return JSONResponse({"ready": not reasons, "reasons": reasons}, status_code=503 if reasons else 200)

        health = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz)])
        served: list[AsgiApp] = [component.http for _, component in self._components if hasattr(component, "http")]
        if not served:
            return health
        (api,) = served

        async def app(scope: Any, receive: Any, send: Any) -> None:
            mine = scope["type"] == "http" and scope["path"] in ("/healthz", "/readyz")
            await (health if mine else api)(scope, receive, send)

        return app


def names(components: Sequence[Component]) -> list[str]:
    """A distinct name for each component: its own `name`, else that of its class, numbered where it repeats."""
    made: list[str] = []
    for component in components:
        own = getattr(component, "name", None)
        name = own if isinstance(own, str) and own else type(component).__name__
        taken = sum(one == name or one.startswith(f"{name}-") for one in made)
        made.append(f"{name}-{taken + 1}" if taken else name)
    return made


async def run(name: str, settings: ServiceSettings, components: Sequence[Component], *, announce: Path | None = None) -> None:
    """Runs the components until SIGTERM or SIGINT, then stops them within `shutdown_grace_s`; returns when all is down.

    When a component cannot start, or its background work fails, the others are stopped and SystemExit(1) is raised. A second
    signal ends the process at once with code 130. The ports are logged ("listening") and written to `announce`, else to the
    file that HEADRACE_ANNOUNCE_FILE names, as {"grpc": port, "http": port, "pid": pid}.
    """
    stopping = asyncio.Event()
    _on_signals(stopping)
    readiness = Readiness(components)
    http = HttpServer(readiness.app(), settings.http_address)
    everything: list[tuple[str, Component]] = [("http", http), *zip(names(components), components, strict=True)]
    running: list[tuple[str, Component]] = []
    watchers: dict[asyncio.Task[Any], str] = {}
    failed = False
    try:
        for component_name, component in everything:
            if stopping.is_set():
                break
            running.append((component_name, component))  # before it starts: one that fails half-way must let go of the other half
            await _start_or_stop(component_name, component, stopping)
        else:
            for component_name, component in running:
                wait = getattr(component, "wait", None)
                if wait is not None:
                    watchers[asyncio.create_task(wait(), name=f"wait for {component_name}")] = component_name
            readiness.phase = None
            _announce([component for _, component in running], announce)
            failed = await _until(stopping, watchers)
    except Exception:
        _log.exception("%s could not start: %s failed", name, running[-1][0] if running else "")
        failed = True
    finally:
        readiness.phase = "stopping"
        for task in watchers:
            task.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        if not await _stop(running, settings.shutdown_grace_s):
            failed = True
    _log.info("%s stopped", name, extra={"failed": failed})
    if failed:
        raise SystemExit(1)


async def _start_or_stop(name: str, component: Component, stopping: asyncio.Event) -> None:
    """Starts a component; a signal that comes while it starts interrupts it."""
    starting = asyncio.create_task(component.start(), name=f"start {name}")
    told = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
    finally:
        told.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)


async def _until(stopping: asyncio.Event, watchers: dict[asyncio.Task[Any], str]) -> bool:
    """Waits for a signal or for the failure of a component; True when it was a failure."""
    told: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    pending: set[asyncio.Task[Any]] = {told, *watchers}
    try:
        while True:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            failures = [(watchers[task], task.exception()) for task in done if task is not told and not task.cancelled()]
            for name, error in failures:
                if error is not None:
                    _log.critical("%s failed, the process stops", name, exc_info=error)
            if any(error is not None for _, error in failures):
                return True
            if told in done:
                return False
    finally:
        told.cancel()


async def _stop(running: Sequence[tuple[str, Component]], grace_s: float) -> bool:
    """Stops in reverse order within the time given; False when one of them would not stop or failed at it."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    clean = True
    for name, component in reversed(running):
        try:
            await asyncio.wait_for(component.stop(), max(_LEAST_STOP_S, deadline - loop.time()))
        except TimeoutError:
            _log.error("%s did not stop in time", name)
            clean = False
        except Exception:
            _log.exception("%s failed while it stopped", name)
            clean = False
    return clean


def _on_signals(stopping: asyncio.Event) -> None:
    def stop(number: signal.Signals) -> None:
        if stopping.is_set():
            _log.warning("second signal, ending at once")
            sys.stdout.flush()
            os._exit(130)
        _log.info("stopping on %s", number.name)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def _announce(running: Sequence[Component], announce: Path | None) -> None:
    ports: dict[str, int] = {}
    for component in running:
        listening = getattr(component, "listening", None)
        if listening is not None:
            ports.update(listening())
    _log.info("listening", extra={**ports, "pid": os.getpid()})
    target = announce or (Path(os.environ[ANNOUNCE_VARIABLE]) if os.environ.get(ANNOUNCE_VARIABLE) else None)
    if target is not None:
        # Renamed into place, so that nobody reads half of it.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_text(json.dumps({**ports, "pid": os.getpid()}))
        partial.replace(target)
