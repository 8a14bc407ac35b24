"""MLflow's REST API on registered models and their versions, one module per kind of thing. `api` puts the table of endpoints together."""
