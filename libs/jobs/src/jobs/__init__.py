"""Long work as rows: claimed under a lease, kept by heartbeats, fenced by a token, retried by cause, cancelled at any time."""

from __future__ import annotations

from jobs import schema
from jobs.queue import Backoff, Job, JobQueue, JobRecord, LeaseLost, State
from jobs.worker import Ended, Handler, JobContext, OnEnd, Worker

__all__ = ["Backoff", "Ended", "Handler", "Job", "JobContext", "JobQueue", "JobRecord", "LeaseLost", "OnEnd", "State", "Worker", "schema"]
