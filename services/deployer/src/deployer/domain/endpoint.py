"""An endpoint: what serves it, which rollout runs on it, which one waits. One runs at a time; the newest that was promoted waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from deployer.domain.events import Completed, Event, Moved, Reverted, RolledBack, RouteSet, RouteWithdrawn, Superseded, WatchEnded
from deployer.domain.inputs import Begin
from deployer.domain.rollout import Rollout, State


@dataclass(frozen=True)
class Endpoint:
    """The deployer's view of one endpoint. Arms and rollouts are named by their ids.

    `serving` has, or is getting, all traffic but a canary's; `previous` stays loaded while its rollout can be reverted.
    `watching` is the completed rollout whose route is still the endpoint's and that is being watched.
    """

    name: str
    revision: int = 0
    serving: str | None = None
    previous: str | None = None
    live: str | None = None
    waiting: str | None = None
    watching: str | None = None


def enqueue(endpoint: Endpoint, rollout_id: str) -> tuple[Endpoint, str | None]:
    """Let a rollout wait for its turn; return the one that it displaces, which is superseded."""
    return replace(endpoint, waiting=rollout_id), endpoint.waiting


def begin(endpoint: Endpoint, live: int = 0) -> tuple[Endpoint, Begin] | None:
    """Give the waiting rollout its turn, or None when nothing waits or another one still runs. `live`: see `Begin`."""
    if endpoint.live is not None or endpoint.waiting is None:
        return None
    return replace(endpoint, live=endpoint.waiting, waiting=None), Begin(endpoint.serving, endpoint.revision, live)


def apply(endpoint: Endpoint, rollout: Rollout, events: Iterable[Event]) -> Endpoint:
    """The endpoint after what was decided about one of its rollouts."""
    for event in events:
        match event:
            case RouteSet() | RouteWithdrawn():
                # A watch ends with the route that is watched: what comes next judges the endpoint as a whole itself.
                endpoint = replace(endpoint, revision=event.revision, watching=None)
            case Moved() if rollout.state is State.REVERTING:
                endpoint = replace(endpoint, live=rollout.id)
            case Completed():
                watching = rollout.id if rollout.watched else None
                endpoint = replace(endpoint, live=None, serving=rollout.canary, previous=rollout.baseline, watching=watching)
            case Reverted():
                endpoint = replace(endpoint, live=None, serving=rollout.baseline, previous=None)
            case WatchEnded():
                previous = None if endpoint.serving == rollout.canary else endpoint.previous
                watching = None if endpoint.watching == rollout.id else endpoint.watching
                endpoint = replace(endpoint, previous=previous, watching=watching)
            case RolledBack() | Superseded():
                live = None if endpoint.live == rollout.id else endpoint.live
                waiting = None if endpoint.waiting == rollout.id else endpoint.waiting
                endpoint = replace(endpoint, live=live, waiting=waiting)
    return endpoint
