"""What the evaluator knows: who is a candidate, what is required of it, and how it is compared. No transport, no store."""
