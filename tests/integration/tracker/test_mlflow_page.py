"""What MLflow's own page asks of the tracker beside the REST API, through the gateway's door."""

from __future__ import annotations

from typing import Any

GET_RUN = """query GetRun($data: MlflowGetRunInput!) @component(name: "MLflow.ExperimentRunTracking") {
  mlflowGetRun(input: $data) {
    apiError { helpUrl: code message __typename }
    run {
      info { runName status runUuid experimentId artifactUri endTime lifecycleStage startTime userId __typename }
      experiment { experimentId name tags { key value __typename } artifactLocation lifecycleStage lastUpdateTime __typename }
      modelVersions { status version name source __typename }
      data { metrics { key value step timestamp } params { key value } tags { key value } }
      inputs { datasetInputs { dataset { digest name profile schema source sourceType } tags { key value } } modelInputs { modelId } }
      outputs { modelOutputs { modelId step } }
      __typename
    }
  }
}"""
GET_EXPERIMENT = """query MlflowGetExperimentQuery($input: MlflowGetExperimentInput!) @component(name: "MLflow.ExperimentRunTracking") {
  mlflowGetExperiment(input: $input) {
    apiError { code message }
    experiment { artifactLocation creationTime lastUpdateTime lifecycleStage experimentId name effectiveTraceArchivalRetention
      tags { key value } }
  }
}"""


async def asked(door: Any, path: str, body: Any, key: str = "key-of-ada") -> Any:
    answer = await door.client.post(f"{door.url}{path}", json=body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_page_reads_a_run_and_its_experiment(door: Any) -> None:
    made = await door.post("/runs/create", {"experiment_id": "0", "run_name": "first", "tags": [{"key": "t", "value": "v"}]})
    run_id = made["run"]["info"]["run_id"]
    points = [{"key": "m", "value": 0.5, "timestamp": 7, "step": 2**62}, {"key": "n", "value": "NaN", "timestamp": 7, "step": 0}]
    await door.post("/runs/log-batch", {"run_id": run_id, "metrics": points, "params": [{"key": "p", "value": "1"}]})
    told = await asked(door, "/graphql", {"operationName": "GetRun", "query": GET_RUN, "variables": {"data": {"runId": run_id}}})
    run = told["data"]["mlflowGetRun"]["run"]
    assert (run["info"]["runUuid"], run["info"]["runName"], run["info"]["status"]) == (run_id, "first", "RUNNING")
    assert run["experiment"]["name"] == "Default"
    assert {one["key"]: one["value"] for one in run["data"]["metrics"]} == {"m": 0.5, "n": None}
    assert run["data"]["metrics"][0]["step"] == str(2**62)
    assert run["data"]["params"] == [{"key": "p", "value": "1"}]
    assert {"key": "t", "value": "v"} in run["data"]["tags"]
    assert told["data"]["mlflowGetRun"]["apiError"] is None
    told = await asked(
        door,
        "/graphql",
        {"operationName": "MlflowGetExperimentQuery", "query": GET_EXPERIMENT, "variables": {"input": {"experimentId": "0"}}},
    )
    experiment = told["data"]["mlflowGetExperiment"]["experiment"]
    assert (experiment["experimentId"], experiment["lifecycleStage"]) == ("0", "active")


async def test_a_run_that_is_not_there_is_an_error_in_words(door: Any) -> None:
    wrong: list[Any] = [{"runId": "0" * 32}, {}, None, {"runId": {}}]
    for given in wrong:
        told = await asked(door, "/graphql", {"operationName": "GetRun", "query": GET_RUN, "variables": {"data": given}})
        assert told["data"]["mlflowGetRun"] is None
        assert all(isinstance(error, str) and error for error in told["errors"])


async def test_what_is_no_query_is_refused(door: Any) -> None:
    bodies: list[Any] = [{"query": "mutation { x }"}, {"query": "{"}, {}, {"query": 3}, {"query": "{a}", "variables": []}, []]
    for body in bodies:
        answer = await door.client.post(f"{door.url}/graphql", json=body, headers={"authorization": "Bearer key-of-ada"})
        assert (answer.status_code, answer.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")


async def test_the_page_gets_the_answers_that_it_waits_for(door: Any) -> None:
    assert await asked(door, "/ajax-api/3.0/mlflow/ui-telemetry", {}) == {"disable_ui_telemetry": True}
    for path in ("/2.0/mlflow/gateway-proxy", "/3.0/mlflow/traces/search", "/3.0/mlflow/traces/metrics"):
        assert await asked(door, f"/ajax-api{path}", {}) == {}
        # A client of the API is told that there is no such thing.
        answer = await door.client.post(f"{door.url}/api{path}", json={}, headers={"authorization": "Bearer key-of-ada"})
        assert answer.status_code == 404
