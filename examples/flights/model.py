"""The network: raw columns in, probability of a late arrival out.

Its preprocessing is part of it, so that training and serving cannot differ.
"""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import torch
from features import CATEGORIES, GAPS, SCHEDULE, WEATHER, tensors
from torch import Tensor, nn

HOLIDAYS = ((1, 1), (1, 21), (2, 18), (3, 31), (5, 27), (7, 4), (9, 2), (10, 14), (11, 11), (11, 28), (12, 25))
"""Holidays of the United States in 2013 around which people travel: (month, day)."""

# A missing observation counts as usual weather; that it is missing is told apart.
_USUAL = {"humid": 60.0, "wind_speed": 10.0, "wind_gust": 0.0, "precip": 0.0, "pressure": 1017.0, "visib": 10.0}
_MISSING_BY = {"wind_gust": "wind_gust_missing", "pressure": "pressure_missing"}
_EMBEDDING = (4, 2, 8, 3, 4)


class FlightNet(nn.Module):
    """Embeddings for the categories, weekday and hour; scaled numbers; two hidden layers.

    `vocabulary` maps each of CATEGORIES to its known values; code 0 stands for every other.
    """

    holidays: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, vocabulary: dict[str, list[str]], *, hidden: int = 64, dropout: float = 0.2) -> None:
        super().__init__()
        sizes = [*(len(vocabulary[column]) + 1 for column in CATEGORIES), 7, 24]
        numbers = 4 + len(WEATHER) + len(_MISSING_BY)
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(sizes, _EMBEDDING, strict=True))
        self.layers = nn.Sequential(
            nn.Linear(sum(_EMBEDDING) + numbers, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.ReLU(),
            nn.Linear(hidden // 2, 1),
        )
        self.register_buffer("holidays", days_to_holiday())
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("scale", torch.ones(numbers))

    def forward(self, *columns: Tensor) -> Tensor:
        """Columns in the order of features.COLUMNS, each [rows, 1], the categories as codes. Probability, [rows, 1]."""
        return torch.sigmoid(self.logits(*self.prepare(*columns)))

    def prepare(self, *columns: Tensor) -> tuple[Tensor, Tensor]:
        """The codes [rows, 5] and the unscaled numbers [rows, 12] of raw columns."""
        carrier, origin, dest, day, weekday, departs, arrives, distance, *rest = columns
        observed = dict(zip((*WEATHER, *GAPS), rest, strict=True))
        codes = torch.cat([carrier, origin, dest, weekday, departs // 100 % 24], dim=1)
        weather = []
        for name in WEATHER:
            missing = observed["weather_missing"]
            if name in _MISSING_BY:
                missing = torch.maximum(missing, observed[_MISSING_BY[name]])
            value = torch.where(missing > 0, torch.full_like(missing, _USUAL[name]), observed[name])
            weather.append(torch.log1p(value * 50) if name == "precip" else value)
        numbers = [
            _minutes(departs) / 1440,
            _minutes(arrives) / 1440,
            torch.log(torch.clamp(distance, min=1).float()),
            self.holidays[torch.clamp(day, 1, len(self.holidays)) - 1],
            *weather,
            *(observed[name] for name in _MISSING_BY.values()),
        ]
        return codes, torch.cat(numbers, dim=1)

    def logits(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """[rows, 1]."""
        scaled = torch.clamp((numbers - self.mean) / self.scale, -4, 4)
        embedded = [embedding(codes[:, i]) for i, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([*embedded, scaled], dim=1))


class Ensemble(nn.Module):
    """The mean probability of several networks."""

    def __init__(self, members: list[FlightNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *columns: Tensor) -> Tensor:
        return torch.stack([member(*columns) for member in self.members]).mean(dim=0)


def days_to_holiday() -> Tensor:
    """For each day of a year (index 0 is January 1st) the days to the nearest holiday, at most 7, over 7."""
    days = np.array([datetime.date(2013, month, day).timetuple().tm_yday for month, day in HOLIDAYS])
    distance = np.abs(np.arange(1, 367)[:, None] - np.append(days, 366)[None, :]).min(axis=1)
    return torch.tensor(np.minimum(distance, 7) / 7, dtype=torch.float32)


def vocabulary_of(table: pa.Table) -> dict[str, list[str]]:
    """The values of each category, in alphabetical order; a value's code is its position from 1."""
    return {column: sorted(table[column].unique().to_pylist()) for column in CATEGORIES}


def encode(table: pa.Table, vocabulary: dict[str, list[str]]) -> list[Tensor]:
    """The columns of a table as `FlightNet.forward` takes them: what the exported graph's front does to strings, in Python."""
    arrays = tensors(table)
    for column in CATEGORIES:
        codes = {value: code for code, value in enumerate(vocabulary[column], start=1)}
        arrays[column] = np.array([codes.get(value, 0) for value in arrays[column][:, 0]], dtype=np.int64).reshape(-1, 1)
    return [torch.from_numpy(arrays[column]) for column in (*CATEGORIES, *SCHEDULE, *WEATHER, *GAPS)]


def fit(
    table: pa.Table,
    labels: np.ndarray,
    vocabulary: dict[str, list[str]],
    *,
    seed: int,
    epochs: int,
    learning_rate: float = 3e-3,
    batch: int = 512,
    dropout: float = 0.2,
    weight_decay: float = 1e-3,
    on_epoch: object = None,
) -> FlightNet:
    """Trains a network on all rows, and returns it in evaluation mode. The same seed on the same machine gives the same network.

    `on_epoch(epoch, mean loss)` is called after each epoch when it is given.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    network = FlightNet(vocabulary, dropout=dropout)
    with torch.no_grad():
        codes, numbers = network.prepare(*encode(table, vocabulary))
        network.mean.copy_(numbers.mean(dim=0))
        network.scale.copy_(numbers.std(dim=0) + 1e-6)
    target = torch.from_numpy(labels.astype(np.float32)).reshape(-1, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(target) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    for epoch in range(epochs):
        network.train()
        total = 0.0
        for rows in torch.randperm(len(target), generator=order).split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(network.logits(codes[rows], numbers[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if callable(on_epoch):
            on_epoch(epoch, total / len(target))
    return network.eval()


def _minutes(clock: Tensor) -> Tensor:
    """Minutes since midnight of a time written HHMM."""
    return (clock // 100 * 60 + clock % 100).float()
