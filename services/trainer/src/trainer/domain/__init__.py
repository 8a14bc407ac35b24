"""The trainer's rules: what a training is, and what the train section of a delivery may say. Plain Python."""
