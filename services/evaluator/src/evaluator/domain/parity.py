"""Parity: whether the exported file says the same as the training code did, on the sample rows that the run logged with the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def largest_difference(answers: Mapping[str, Any], logged: Mapping[str, Any]) -> float:
    """The largest absolute difference over all elements of all logged outputs. Texts differ by 1 or not at all.

    `answers` are the exported file's arrays by output name, `logged` what the training code got, as arrays or nested lists; a last
    dimension of 1 may be left out. Raises ValueError when an output is missing, the shapes differ, or a value is not a finite number.
    """
    return max((_difference(name, answers, np.asarray(values)) for name, values in logged.items()), default=0.0)


def _difference(name: str, answers: Mapping[str, Any], wanted: np.ndarray[Any, Any]) -> float:
    if name not in answers:
        raise ValueError(f"the model has no output {name!r}, which was logged")
    found = np.asarray(answers[name])
    if found.ndim == wanted.ndim + 1 and found.shape[-1] == 1:
        wanted = wanted[..., np.newaxis]
    if found.shape != wanted.shape:
        raise ValueError(f"the output {name!r} has the shape {list(found.shape)}, logged was {list(wanted.shape)}")
    if found.dtype.kind in "US" or wanted.dtype.kind in "US":
        return float((found.astype(np.str_) != wanted.astype(np.str_)).any())
    if found.dtype.kind not in "fiub" or wanted.dtype.kind not in "fiub":
        raise ValueError(f"the output {name!r} does not hold numbers")
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    if not np.isfinite(difference).all():
        raise ValueError(f"the output {name!r} holds values that are not finite")
    return float(difference.max(initial=0.0))
