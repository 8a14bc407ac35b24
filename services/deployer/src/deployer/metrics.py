"""The deployer's own metrics. Those of calls, jobs and events come from the libraries."""

from __future__ import annotations

from opentelemetry import metrics

from deployer.domain.rollout import Rollout

_meter = metrics.get_meter("deployer")

# Attributes: headrace.endpoint, and headrace.rollout.state where it says so.
_moves = _meter.create_counter("headrace.rollout.moves", unit="1", description="Changes of state, step or hold; by the state moved to")
_windows = _meter.create_counter("headrace.rollout.windows", unit="{window}", description="Merged windows that were judged")

_alarms = _meter.create_counter(
    "headrace.rollout.alarms", unit="1", description="Completed rollouts whose endpoint broke a guard's at_most while they were watched"
)

# Attribute: headrace.runtime.
_lost = _meter.create_counter("headrace.runtime.models_lost", unit="{model}", description="Models that a runtime was found to have lost")


def moved(rollout: Rollout) -> None:
    """A rollout moved."""
    state = rollout.state.value if rollout.hold is None else f"held_{rollout.hold.value}"
    _moves.add(1, {"headrace.endpoint": rollout.endpoint, "headrace.rollout.state": state})


def judged(rollout: Rollout) -> None:
    """A merged window was judged."""
    _windows.add(1, {"headrace.endpoint": rollout.endpoint})


def alarmed(rollout: Rollout) -> None:
    """A version that had completed turned out to be bad."""
    _alarms.add(1, {"headrace.endpoint": rollout.endpoint})


def lost(runtime: str, models: int) -> None:
    """A runtime had lost models."""
    _lost.add(models, {"headrace.runtime": runtime})
