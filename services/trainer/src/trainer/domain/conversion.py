"""A model of a finished run that is to be converted to ONNX, as run.finished tells of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversion:
    """The model lies at `folder` among the artifacts of `owner`, a run or a logged model."""

    run_id: str
    experiment: str
    owner: str
    folder: str
    name: str
    flavors: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key of its job: one for each place."""
        return f"{self.run_id}:{self.owner}:{self.folder}"
