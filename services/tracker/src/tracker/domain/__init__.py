"""The tracker's rules: what a run is, what it may log, when it has ended. Plain Python."""
