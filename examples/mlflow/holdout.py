"""Writes customers that no training has seen, with who left, as a Parquet file: `python holdout.py FILE`."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

rng = np.random.default_rng(7)
rows = pd.DataFrame({"age": rng.normal(45, 12, 2_000), "visits": rng.normal(8, 3, 2_000)})
rows["left"] = (rng.random(2_000) < 1 / (1 + np.exp(rows.visits - 0.1 * rows.age - 3.5))).astype(int)
rows.to_parquet(sys.argv[1], index=False)
