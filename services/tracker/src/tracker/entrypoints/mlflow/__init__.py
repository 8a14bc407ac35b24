"""MLflow's REST API on experiments and runs, one module per kind of thing. `api` puts the table of endpoints together."""
