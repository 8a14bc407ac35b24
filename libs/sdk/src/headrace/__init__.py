"""The Headrace Python client: runs, models and data sets, through the gateway's one URL.

import headrace

with headrace.start_run(experiment="flight-delays") as run:
    run.log_params({"lr": 0.01})
    run.log_metric("loss", 0.31, step=1)
    run.log_model("model.onnx", signature=..., samples=...)
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

if find_spec("httpx") is None and "HEADRACE_PACKAGES" in os.environ:
    # A trainer shows its trainings this package without installing it; what it needs lies beside it, behind all that is the script's own.
    sys.path.append(os.environ["HEADRACE_PACKAGES"])

from headrace.datasets import DatasetVersion, pull_dataset, push_dataset
from headrace.http import Client, Denied, HeadraceError, InvalidInput, Unreachable
from headrace.runs import Run, start_run

__all__ = [
    "Client",
    "DatasetVersion",
    "Denied",
    "HeadraceError",
    "InvalidInput",
    "Run",
    "Unreachable",
    "pull_dataset",
    "push_dataset",
    "start_run",
]
