"""`make demo`: real flights through the whole chain, and a ledger that says whether it held."""
