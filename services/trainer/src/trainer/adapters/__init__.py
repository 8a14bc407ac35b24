"""What the trainer's ports are in the real world: PostgreSQL, the tracker, log files."""
