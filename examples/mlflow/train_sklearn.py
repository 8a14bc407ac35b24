"""A scikit-learn training as it would be anywhere: it tracks with MLflow and knows of nothing else."""

from __future__ import annotations

import os

import mlflow
import numpy as np
import pandas as pd
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

mlflow.set_experiment(os.environ.get("EXPERIMENT", "churn"))

rng = np.random.default_rng(1)
rows = pd.DataFrame({"age": rng.normal(45, 12, 4_000), "visits": rng.normal(8, 3, 4_000)})
left = (rng.random(4_000) < 1 / (1 + np.exp(rows.visits - 0.1 * rows.age - 3.5))).astype(int)

with mlflow.start_run() as run:
    mlflow.log_params({"trees": 40, "learning_rate": 0.1})
    model = make_pipeline(StandardScaler(), GradientBoostingClassifier(n_estimators=40, random_state=0))
    model.fit(rows[:3_000], left[:3_000])
    mlflow.log_metric("auc", roc_auc_score(left[3_000:], model.predict_proba(rows[3_000:])[:, 1]))
    mlflow.sklearn.log_model(model, name="model", input_example=rows[:20], serialization_format="cloudpickle")
print(run.info.run_id)
