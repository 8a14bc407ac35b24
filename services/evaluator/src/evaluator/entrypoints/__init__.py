"""How others reach the evaluator: gRPC, events, and its jobs."""
