"""From a model version back to its evaluation, its run, the data and the code: asked of the services that own each."""

from __future__ import annotations

from contracts.evaluator.v1 import service_pb2 as evaluator_pb
from contracts.registry.v1 import service_pb2 as registry_pb
from contracts.tracker.v1 import service_pb2 as tracker_pb

from gateway.control.peers import Peers
from gateway.control.wire import Json


async def lineage_of(peers: Peers, model: str, version: int) -> Json:
    """What a version was made from, newest first, as {step: {field: value}}. Raises NotFound for an unknown version."""
    found = (await peers.registry.GetVersion(registry_pb.GetVersionRequest(model=model, version=version))).version
    evaluation = (await peers.evaluator.GetEvaluation(evaluator_pb.GetEvaluationRequest(evaluation_id=found.evaluation_id))).evaluation
    run = (await peers.tracker.GetRun(tracker_pb.GetRunRequest(run_id=found.journey.run_id))).run
    judged = evaluation.judgement
    compared = judged.comparison
    return {
        "version": {"model": model, "version": version, "stage": found.stage, "sha256": found.model.blob.sha256, "reason": found.reason},
        "delivery": {"name": found.journey.delivery, "revision": found.journey.delivery_revision, "journey": found.journey.journey_id},
        "evaluation": {
            "id": evaluation.evaluation_id,
            "status": evaluation.status,
            compared.metric or "metric": round(compared.challenger, 4),
            "champion": f"v{judged.champion_version}" if judged.champion_version else "none",
            "holdout": f"{judged.holdout.name} v{judged.holdout.version}",
        },
        "run": {"id": run.run_id, "name": run.name, "user": run.user, "training": run.source.training_id},
        "data": {f"{data.name}": f"v{data.version} ({data.sha256[:12]})" for data in run.inputs},
        "code": {
            "commit": run.source.commit,
            "dirty": "yes" if run.source.dirty else "no",
            "command": run.source.command,
            "diff": run.source.diff_key,
        },
    }
