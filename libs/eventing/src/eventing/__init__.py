"""Events delivered exactly once: outbox, relay, broker, inbox, dead letters. docs/eventing.md explains; import the modules by name."""
