"""The registry's domain: deliveries, model versions, approvals and access keys. Plain Python: no transport, no store, no clock."""
