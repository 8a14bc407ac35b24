"""The registry's metrics, all declared here. Names follow OpenTelemetry; units in UCUM."""

from __future__ import annotations

from opentelemetry import metrics

_meter = metrics.get_meter("registry")

# Attribute: outcome (sent, failed: tried again, gave_up).
webhooks = _meter.create_counter("registry.webhooks", unit="1", description="Attempts to tell approvers that they are awaited")
# Attribute: outcome (created, changed, unchanged, deleted).
deliveries = _meter.create_counter("registry.deliveries", unit="1", description="Delivery files applied or deleted")
# Attribute: type, like model.promoted.
events = _meter.create_counter("registry.events", unit="{event}", description="Events written to the outbox")
