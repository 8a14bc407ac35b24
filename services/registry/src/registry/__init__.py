"""The registry: deliveries, models and their versions, approvals, access keys and the audit log. Only it promotes."""
