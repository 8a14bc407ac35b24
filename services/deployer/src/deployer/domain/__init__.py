"""The rollout as plain Python: policy, statistics and state machine, without a clock, a store or a transport."""
