"""How calls, deliveries and jobs reach the trainer."""
