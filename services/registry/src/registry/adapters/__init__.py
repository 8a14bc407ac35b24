"""The registry's adapters: PostgreSQL, the services that validate sections, webhooks."""
