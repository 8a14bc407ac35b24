"""A script as people write them for MLflow's model registry: it registers, names, moves, finds, and meets errors. Needs no tracker."""

from __future__ import annotations

import json

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

RUN = "0123456789abcdef0123456789abcdef"


def code_of(call: object, *arguments: object, **named: object) -> str:
    """The error code that a call ends with."""
    try:
        call(*arguments, **named)  # type: ignore[operator]
    except MlflowException as error:
        return str(error.error_code)
    return "none"


client = MlflowClient()
model = client.create_registered_model("wine", tags={"team": "red"}, description="grapes")
assert (model.name, model.tags, model.description) == ("wine", {"team": "red"}, "grapes")
first = client.create_model_version("wine", f"runs:/{RUN}/model", RUN, tags={"n": 1}, description="the first")
assert (first.version, first.current_stage, first.status, first.run_id, first.tags) == ("1", "None", "READY", RUN, {"n": "1"})
assert client.get_model_version("wine", "1").source == f"runs:/{RUN}/model"
for _ in range(2):
    client.create_model_version("wine", f"mlflow-artifacts:/1/{RUN}/artifacts/model", RUN)
client.set_registered_model_alias("wine", "blue", "2")
assert client.get_model_version_by_alias("wine", "blue").version == "2"
assert client.get_registered_model("wine").aliases == {"blue": "2"}
client.delete_registered_model_alias("wine", "blue")
assert client.transition_model_version_stage("wine", "1", "Staging").current_stage == "Staging"
client.transition_model_version_stage("wine", "2", "Staging", archive_existing_versions=True)
assert {version.version: version.current_stage for version in client.get_latest_versions("wine")} == {
    "3": "None",
    "2": "Staging",
    "1": "Archived",
}
assert [version.version for version in client.get_latest_versions("wine", ["Staging"])] == ["2"]
client.set_registered_model_tag("wine", "k", "v")
client.delete_registered_model_tag("wine", "team")
client.set_model_version_tag("wine", "1", "k", "v")
client.delete_model_version_tag("wine", "1", "n")
assert (client.get_registered_model("wine").tags, client.get_model_version("wine", "1").tags) == ({"k": "v"}, {"k": "v"})
assert client.update_registered_model("wine", "grün").description == "grün"
assert client.update_model_version("wine", "1", "changed").description == "changed"
assert [one.name for one in client.search_registered_models("name ILIKE 'WI%' AND tags.k = 'v'")] == ["wine"]
page = client.search_model_versions("name='wine'", max_results=2, order_by=["version_number ASC"])
rest = client.search_model_versions("name='wine'", max_results=2, order_by=["version_number ASC"], page_token=page.token)
assert [one.version for one in [*page, *rest]] == ["1", "2", "3"]
assert not rest.token
copied = client.copy_model_version("models:/wine/1", "cellar")
assert (copied.name, copied.version, copied.run_id) == ("cellar", "1", RUN)
assert client.get_model_version_download_uri("cellar", "1") == f"runs:/{RUN}/model"
seen = {
    "same name": code_of(client.create_registered_model, "wine"),
    "taken name": code_of(client.rename_registered_model, "cellar", "wine"),
    "no model": code_of(client.get_registered_model, "unknown"),
    "no version": code_of(client.get_model_version, "wine", "9"),
    "no alias": code_of(client.get_model_version_by_alias, "wine", "blue"),
    "reserved alias": code_of(client.set_registered_model_alias, "wine", "v1", "1"),
    "a file": code_of(client.create_model_version, "wine", "file:///etc/passwd"),
    "a bucket": code_of(client.create_model_version, "wine", "s3://bucket/key"),
    "not evaluated": code_of(client.transition_model_version_stage, "wine", "3", "Production"),
    "champion": code_of(client.set_registered_model_alias, "wine", "champion", "3"),
    "bad filter": code_of(client.search_registered_models, "name = 'x' OR name = 'y'"),
}
client.rename_registered_model("cellar", "vault")
assert client.get_registered_model("vault").name == "vault"
client.delete_model_version("wine", "3")
client.delete_registered_model("vault")
seen |= {
    "deleted version": code_of(client.get_model_version, "wine", "3"),
    "deleted model": code_of(client.get_registered_model, "vault"),
}
print(json.dumps(seen))
