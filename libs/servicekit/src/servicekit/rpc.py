"""gRPC for services: a server that lets nobody in without a rule and answers errors by the table of errors.py, and a channel
that sends who we are, what trace this is and by when, and raises the server's error as it was raised there."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from servicekit import access, errors, telemetry
from servicekit.access import AccessTable, Caller
from servicekit.errors import DeadlineExceeded, HeadraceError, Invalid
from servicekit.settings import ServiceSettings, parse_token_hashes

MAX_DEADLINE_S = 60.0
"""A server works on a unary call for this long at most, whatever its caller would wait."""

MAX_STREAM_DEADLINE_S = 3600.0
"""The same for calls that stream."""

DEFAULT_DEADLINE_S = 10.0
"""A channel's deadline for a unary call whose caller gave none."""

MAX_IN_FLIGHT = 200
"""Unary calls at once on one channel: beyond some 2,000, gRPC's asyncio client cancels a tenth of them."""

TRACEPARENT = "traceparent"
"""Metadata that carries the W3C trace context."""

# Metrics, by the semantic conventions of OpenTelemetry for RPC.
SERVER_DURATION = "rpc.server.call.duration"
CLIENT_DURATION = "rpc.client.call.duration"

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_log = logging.getLogger(__name__)
_deadline: ContextVar[float | None] = ContextVar("headrace_deadline", default=None)
_acting_for: ContextVar[Caller | None] = ContextVar("headrace_acting_for", default=None)


def time_left() -> float | None:
    """Seconds that the request being handled has left; None outside of one. Calls made on its behalf inherit them."""
    deadline = _deadline.get()
    return None if deadline is None else deadline - time.monotonic()


@contextmanager
def acting_for(caller: Caller) -> Iterator[None]:
    """Calls made within the block are made on behalf of this end user. Servers believe it from the gateway only."""
    token = _acting_for.set(caller)
    try:
        yield
    finally:
        _acting_for.reset(token)


class Server:
    """A gRPC server on `host:port` whose methods may be called as `methods` says and not otherwise; a lifecycle component.

    Health (open to all) and reflection (open to known services) are there by themselves.
    """

    name = "grpc"

    def __init__(self, address: str, settings: ServiceSettings, methods: AccessTable) -> None:
        self._address = address
        self._grace_s = settings.shutdown_grace_s * 0.8  # the rest is for the components that stop after it
        self._methods = dict(methods)
        self._services: list[str] = []
        self._health = health.aio.HealthServicer()
        self._port: int | None = None
        self._stopped = asyncio.Event()
        guard = _Guard(self._methods, parse_token_hashes(settings.service_token_hashes))
        self._server = grpc.aio.server(
            interceptors=[guard],
            options=[
                ("grpc.max_receive_message_length", settings.grpc_max_message_bytes),
                ("grpc.max_send_message_length", settings.grpc_max_message_bytes),
                ("grpc.so_reuseport", 0),  # a port that is taken must be an error, not a share of its calls
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )

    def add(self, adder: Callable[[Any, grpc.aio.Server], None], servicer: object, full_service_name: str) -> None:
        """Adds a service: the generated `add_XServicer_to_server`, the servicer, `headrace.tracker.v1.TrackerService`."""
        adder(servicer, self._server)
        self._services.append(full_service_name)

    async def start(self) -> int:
        """Listens and returns the port. Raises ValueError when a rule names no method that is served, OSError when the port is taken."""
        self._check_rules()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*self._services, _HEALTH, reflection.SERVICE_NAME], self._server)
        try:
            self._port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}") from error
        await self._server.start()
        await self.set_serving(True)
        return self._port

    async def set_serving(self, serving: bool) -> None:
        """What the health service says of every service; after `stop` it stays at not serving."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace: float | None = None) -> None:
        """Says not serving, takes no new calls, lets those in flight end within `grace` seconds (default: most of the shutdown grace)."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._grace_s if grace is None else grace)
        self._stopped.set()

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        # Not gRPC's own wait_for_termination: cancelling that makes a later stop hang.
        await self._stopped.wait()

    def listening(self) -> Mapping[str, int]:
        """{"grpc": port} once started."""
        return {} if self._port is None else {self.name: self._port}

    def _check_rules(self) -> None:
        served = {f"/{service}/{method.name}" for service in self._services for method in _descriptors().FindServiceByName(service).methods}
        if unknown := sorted(set(self._methods) - served):
            raise ValueError(f"access rules for methods that are not served: {', '.join(unknown)}")
        if unruled := sorted(served - set(self._methods)):
            _log.warning("methods without an access rule are denied to all: %s", ", ".join(unruled))


Behavior = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Any]


class _Guard(grpc.aio.ServerInterceptor):
    """Around every call: who is it, may it, by when, in which trace, and how is its error told."""

    def __init__(self, methods: AccessTable, token_hashes: Mapping[str, str]) -> None:
        self._methods = methods
        self._token_hashes = token_hashes
        self._duration = telemetry.meter().create_histogram(SERVER_DURATION, unit="s", description="Time of calls served")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        method = _text(handler_call_details.method)
        if handler is None or method.startswith(f"/{_HEALTH}/"):
            return handler  # type: ignore[no-any-return]  # None: gRPC answers that there is no such method
        metadata = {key: value for key, value in handler_call_details.invocation_metadata or () if isinstance(value, str)}
        try:
            caller = self._admit(method, metadata)
        except HeadraceError as refusal:
            return _refusing(handler, refusal)
        return self._wrapped(handler, method, caller, metadata)

    def _admit(self, method: str, metadata: Mapping[str, str]) -> Caller:
        caller = access.identify(metadata, self._token_hashes)
        if not method.startswith(f"/{reflection.SERVICE_NAME}/"):
            access.authorize(method, caller, self._methods)
        return caller

    def _wrapped(self, handler: Any, method: str, caller: Caller, metadata: Mapping[str, str]) -> grpc.RpcMethodHandler[Any, Any]:
        streams = handler.request_streaming or handler.response_streaming
        behavior: Behavior = (
            (handler.stream_stream if handler.request_streaming else handler.unary_stream)
            if handler.response_streaming
            else (handler.stream_unary if handler.request_streaming else handler.unary_unary)
        )

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                with self._measured(method, caller, metadata):
                    remaining = context.time_remaining()
                    # Without a deadline gRPC reports the time until some day in the far future, or None.
                    if remaining is None or remaining > 365 * 86400:
                        raise Invalid(f"{method} must be called with a deadline")
                    limit = min(remaining, MAX_STREAM_DEADLINE_S if streams else MAX_DEADLINE_S)
                    return await _within(limit, caller, method, behavior, handler.response_streaming, request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # the one place where any error is turned into a status
                await _abort(context, error)

        return _handler_like(handler, guarded)

    @contextmanager
    def _measured(self, method: str, caller: Caller, metadata: Mapping[str, str]) -> Iterator[None]:
        attributes = _attributes(method)
        started = time.perf_counter()
        code = "OK"
        parent = telemetry.context_from(metadata.get(TRACEPARENT, ""))
        details = {**attributes, "headrace.caller": caller.service}
        try:
            with telemetry.start_span(method.removeprefix("/"), SpanKind.SERVER, parent, attributes=details):
                try:
                    yield
                except grpc.aio.AbortError:
                    code = "ABORT"  # the servicer has answered by itself
                    raise
                except Exception as error:
                    # Translated here, within the span, so that span, metric, log and answer name the same error.
                    told = errors.explain(error)
                    code = errors.row(errors.GRPC_CODES, type(told)).name
                    raise told from error
                except asyncio.CancelledError:
                    code = "CANCELLED"
                    raise
        finally:
            self._duration.record(time.perf_counter() - started, {**attributes, "rpc.response.status_code": code})


async def _within(
    limit: float,
    caller: Caller,
    method: str,
    behavior: Behavior,
    streams_out: bool,
    request: Any,
    context: grpc.aio.ServicerContext[Any, Any],
) -> Any:
    """Runs the servicer's method as this caller, for `limit` seconds at most; whichever of gRPC's styles it is written in."""
    deadline_token = _deadline.set(time.monotonic() + limit)
    try:
        with access.as_caller(caller):
            scope = asyncio.timeout(limit)
            try:
                async with scope:
                    result = behavior(request, context)
                    if streams_out and hasattr(result, "__aiter__"):
                        async with aclosing(result):
                            async for response in result:
                                await context.write(response)
                        return None
                    return await result
            except TimeoutError:
                if scope.expired():
                    raise DeadlineExceeded(f"{method} took longer than {limit:.1f} s") from None
                raise
    finally:
        _deadline.reset(deadline_token)


def _refusing(handler: Any, refusal: HeadraceError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, refusal)

    return _handler_like(handler, refuse, read_request=False)


def _handler_like(handler: Any, behavior: Behavior, read_request: bool = True) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same arity around another behaviour; what a refused caller sent is not even parsed."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    made: grpc.RpcMethodHandler[Any, Any] = make(
        behavior,
        request_deserializer=handler.request_deserializer if read_request else None,
        response_serializer=handler.response_serializer,
    )
    return made


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    status = errors.to_grpc_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((errors.STATUS_DETAILS_KEY, status.SerializeToString()),))


def channel(
    address: str,
    settings: ServiceSettings,
    *,
    idempotent: Collection[str] = (),
    deadline_s: float = DEFAULT_DEADLINE_S,
    max_in_flight: int = MAX_IN_FLIGHT,
) -> grpc.aio.Channel:
    """A channel to another service. Connects at first use and again by itself; close it at the end.

    Stubs on it are called as ever (`await stub.GetRun(request)`, `async for line in stub.Logs(request)`, `timeout=` for another
    deadline in seconds), send our service token, the current trace and, within `acting_for`, the end user, and raise the
    errors of servicekit.errors. Methods named in `idempotent` (`/headrace.tracker.v1.TrackerService/GetRun`) are tried up to
    four times while the server is unavailable; no other is.
    """
    options = [
        ("grpc.max_receive_message_length", settings.grpc_max_message_bytes),
        ("grpc.max_send_message_length", settings.grpc_max_message_bytes),
        ("grpc.service_config", json.dumps(_service_config(idempotent))),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", 0),
        # Channels to one address would otherwise share a connection, and its credentials' fate.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return _Channel(grpc.aio.insecure_channel(address, options=options), settings, deadline_s, max_in_flight)


def _service_config(idempotent: Collection[str]) -> dict[str, Any]:
    names = []
    for method in sorted(idempotent):
        service, _, name = method.removeprefix("/").partition("/")
        if not service or not name:
            raise ValueError(f"{method!r} is not written /package.Service/Method")
        names.append({"service": service, "method": name})
    if not names:
        return {}
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}


class _Channel(grpc.aio.Channel):
    """A gRPC channel in our terms. Wrapped rather than intercepted: an interceptor costs a task per call."""

    def __init__(self, inner: grpc.aio.Channel, settings: ServiceSettings, deadline_s: float, max_in_flight: int) -> None:
        self._inner = inner
        self._token = settings.service_token
        self._deadline_s = deadline_s
        self._free = asyncio.Semaphore(max_in_flight)
        self._duration = telemetry.meter().create_histogram(CLIENT_DURATION, unit="s", description="Time of calls made")

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._unary(method, self._inner.unary_unary(method, *args, **kwargs))

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._unary(method, self._inner.stream_unary(method, *args, **kwargs))

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._stream(method, self._inner.unary_stream(method, *args, **kwargs))

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._stream(method, self._inner.stream_stream(method, *args, **kwargs))

    def _unary(self, method: str, inner: Any) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any = None, *, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> Any:
            limit = self._limit(timeout, self._deadline_s)
            deadline = time.monotonic() + limit
            try:
                async with asyncio.timeout(limit):
                    await self._free.acquire()
            except TimeoutError:
                raise DeadlineExceeded(f"no call to {method} became free in time") from None
            try:
                with self._measured(method):
                    remaining = deadline - time.monotonic()
                    return await inner(request, timeout=remaining, metadata=self._metadata(metadata), **kwargs)
            finally:
                self._free.release()

        return call

    def _stream(self, method: str, inner: Any) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any = None, *, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
            limit = self._limit(timeout, MAX_STREAM_DEADLINE_S)
            started = time.perf_counter()
            failure: BaseException | None = None
            opened = telemetry.OpenSpan(method.removeprefix("/"), SpanKind.CLIENT, attributes=_attributes(method))
            with trace.use_span(opened.span, end_on_exit=False):
                responses = inner(request, timeout=limit, metadata=self._metadata(metadata), **kwargs)
            try:
                async for response in responses:
                    yield response
            except grpc.aio.AioRpcError as error:
                failure = error
                raise errors.from_rpc_error(error) from None
            except BaseException as error:
                failure = error
                raise
            finally:
                responses.cancel()  # a reader that leaves early must not keep the server writing
                opened.end(errors.from_rpc_error(failure) if isinstance(failure, grpc.aio.AioRpcError) else failure)
                self._record(method, started, failure)

        return call

    def _limit(self, timeout: float | None, default: float) -> float:
        left = time_left()
        limit = default if timeout is None else timeout
        return max(limit if left is None else min(limit, left), 0.0)

    def _metadata(self, given: Any) -> list[tuple[str, str | bytes]]:
        metadata: list[tuple[str, str | bytes]] = [(access.AUTHORIZATION, f"Bearer {self._token.get_secret_value()}")]
        if traceparent := telemetry.current_traceparent():
            metadata.append((TRACEPARENT, traceparent))
        if caller := _acting_for.get():
            metadata.extend(access.identity_metadata(caller))
        metadata.extend(given or ())
        return metadata

    @contextmanager
    def _measured(self, method: str) -> Iterator[None]:
        started = time.perf_counter()
        failure: BaseException | None = None
        try:
            with telemetry.start_span(method.removeprefix("/"), SpanKind.CLIENT, attributes=_attributes(method)):
                try:
                    yield
                except grpc.aio.AioRpcError as error:
                    failure = error
                    raise errors.from_rpc_error(error) from None
                except BaseException as error:
                    failure = error
                    raise
        finally:
            self._record(method, started, failure)

    def _record(self, method: str, started: float, failure: BaseException | None) -> None:
        if failure is None:
            code = grpc.StatusCode.OK
        else:
            code = failure.code() if isinstance(failure, grpc.aio.AioRpcError) else grpc.StatusCode.CANCELLED
        self._duration.record(time.perf_counter() - started, {**_attributes(method), "rpc.response.status_code": code.name})

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def _attributes(method: str) -> dict[str, str]:
    return {"rpc.system.name": "grpc", "rpc.method": method.removeprefix("/")}


def _descriptors() -> Any:
    return descriptor_pool.Default()  # type: ignore[no-untyped-call]  # its stub lacks the annotation


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
