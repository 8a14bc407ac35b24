"""How the outside reaches the registry: gRPC and events."""
