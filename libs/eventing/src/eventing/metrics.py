"""The metrics of eventing, all declared here. Names follow OpenTelemetry; units in UCUM."""

from __future__ import annotations

from opentelemetry import metrics

_meter = metrics.get_meter("eventing")

# Relay and outbox; attribute: schema.
outbox_depth = _meter.create_gauge("eventing.outbox.depth", unit="{event}", description="Events that wait to be published")
outbox_age = _meter.create_gauge("eventing.outbox.age", unit="s", description="Age of the oldest event that waits to be published")
relay_active = _meter.create_gauge("eventing.relay.active", unit="1", description="1 where this process holds the relay's lock")
relay_sent = _meter.create_counter("eventing.relay.sent", unit="{event}", description="Events acknowledged by the broker and marked")
relay_failures = _meter.create_counter("eventing.relay.failures", unit="1", description="Sessions of the relay that ended in an error")
outbox_pruned = _meter.create_counter("eventing.outbox.pruned", unit="{event}", description="Sent events deleted after their retention")

# Consumers; attributes: consumer, and topic where it says so.
consumer_lag = _meter.create_gauge("eventing.consumer.lag", unit="{event}", description="Records behind the end of the log; by topic")
applied = _meter.create_counter("eventing.consumer.applied", unit="{event}", description="Events whose handler's effect was committed")
skipped = _meter.create_counter("eventing.consumer.skipped", unit="{event}", description="Events of a type without a handler; by type")
duplicates = _meter.create_counter("eventing.consumer.duplicates", unit="{event}", description="Events dropped: applied before")
parked = _meter.create_counter("eventing.consumer.parked", unit="{event}", description="Events parked as invalid or behind such a one")
retries = _meter.create_counter("eventing.consumer.retries", unit="1", description="Backoffs because something passing failed")
fenced = _meter.create_counter("eventing.consumer.fenced", unit="1", description="Batches dropped because another process had advanced")

# Best effort; attribute: topic.
best_effort_sent = _meter.create_counter("eventing.best_effort.sent", unit="{event}", description="Best-effort events acknowledged")
best_effort_dropped = _meter.create_counter("eventing.best_effort.dropped", unit="{event}", description="Best-effort events shed or lost")
