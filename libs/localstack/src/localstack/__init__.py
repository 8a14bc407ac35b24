"""The whole system on one machine: real PostgreSQL, Kafka, S3 and Triton from package registries, supervised, and the six services.

Start with `api.py` for what the command line calls, `services.py` for what is started, `supervisor.py` for how.
"""
