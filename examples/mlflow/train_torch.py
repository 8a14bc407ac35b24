"""A PyTorch training as it would be anywhere: it tracks with MLflow and knows of nothing else."""

from __future__ import annotations

import os

import mlflow
import numpy as np
import torch
from torch import nn

mlflow.set_experiment(os.environ.get("EXPERIMENT", "churn"))
torch.manual_seed(0)

rng = np.random.default_rng(1)
rows = np.stack([rng.normal(45, 12, 4_000), rng.normal(8, 3, 4_000)], axis=1).astype(np.float32)
left = (rng.random(4_000) < 1 / (1 + np.exp(rows[:, 1] - 0.1 * rows[:, 0] - 3.5))).astype(np.float32)


class Churn(nn.Module):
    """The probability that a customer leaves, of age and visits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        self.register_buffer("mean", torch.tensor([45.0, 8.0]))
        self.register_buffer("scale", torch.tensor([12.0, 3.0]))

    def forward(self, age: torch.Tensor, visits: torch.Tensor) -> torch.Tensor:
        return self.layers((torch.cat([age, visits], dim=1) - self.mean) / self.scale)


age, visits, labels = torch.from_numpy(rows[:, :1]), torch.from_numpy(rows[:, 1:]), torch.from_numpy(left)
with mlflow.start_run() as run:
    mlflow.log_params({"hidden": 16, "optimizer": "adam"})
    model = Churn()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(200):
        loss = nn.functional.binary_cross_entropy(model(age, visits)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mlflow.log_metric("loss", loss.item(), step=step)
    model.eval()
    example = {"age": rows[:20, :1], "visits": rows[:20, 1:]}
    mlflow.pytorch.log_model(model, name="model", input_example=example, serialization_format="pickle")
print(run.info.run_id)
