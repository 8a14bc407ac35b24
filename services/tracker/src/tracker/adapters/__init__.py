"""What the tracker's ports are in the real world: PostgreSQL tables and the unit of work on them."""
