"""The gateway's metrics, declared once. They are fed from the traffic windows, so a request pays nothing for them."""

from __future__ import annotations

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from servicekit import telemetry

from gateway.plane import DataPlane
from gateway.windows import Report

SCOPE = "headrace.gateway"


class Metrics:
    """Rate, errors and duration per endpoint and arm, copies, and the connections of this process."""

    def __init__(self, plane: DataPlane, meter: Meter | None = None) -> None:
        meter = meter or telemetry.meter(SCOPE)
        self._plane = plane
        self._requests = meter.create_counter(
            "headrace.gateway.requests", "{request}", "Requests (callers, where callers are assigned) per arm."
        )
        self._errors = meter.create_counter("headrace.gateway.errors", "{request}", "Requests whose arm failed.")
        self._fallbacks = meter.create_counter("headrace.gateway.fallbacks", "{request}", "Requests answered by another arm in its place.")
        self._duration = meter.create_counter(
            "headrace.gateway.duration.bucket", "{request}", "Requests by latency bucket; `le`: upper bound in ms, inf for the last."
        )
        self._copies = meter.create_counter("headrace.gateway.shadow_copies", "{copy}", "Shadow copies by outcome.")
        meter.create_observable_gauge(
            "headrace.gateway.connections", [self._connections], "{connection}", "Open connections, of clients and to runtimes."
        )

    def take(self, report: Report) -> None:
        """Adds what a report counted."""
        for endpoint in report.endpoints:
            for arm in endpoint.arms:
                labels = {"endpoint": endpoint.endpoint, "arm": arm.arm}
                if arm.requests:
                    self._requests.add(arm.requests, labels)
                if arm.errors:
                    self._errors.add(arm.errors, labels)
                if arm.fallbacks:
                    self._fallbacks.add(arm.fallbacks, labels)
                for index, count in enumerate(arm.buckets):
                    if count:
                        bound = "inf" if index == len(arm.buckets) - 1 else f"{0.25 * 2**index:g}"
                        self._duration.add(count, {**labels, "le": bound})
                for outcome in ("sent", "compared", "different", "shed", "errors"):
                    count = getattr(arm, f"shadow_{outcome}")
                    if count:
                        self._copies.add(count, {**labels, "outcome": outcome})

    def _connections(self, options: CallbackOptions) -> list[Observation]:
        upstream = sum(pool.connections for pool in self._plane.arms.pools())
        return [Observation(len(self._plane.connections), {"side": "client"}), Observation(upstream, {"side": "runtime"})]
