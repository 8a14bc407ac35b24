"""The grammar of a delivery's train section: what is right, and how each thing that is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer.domain.errors import Rejected
from trainer.domain.section import parse
from trainer.domain.training import Resources

GOOD: dict[str, Any] = {"source": {"path": "examples/flights"}, "command": ["python", "train.py"]}


def wrong(**changes: Any) -> list[str]:
    with pytest.raises(Rejected) as caught:
        parse(json.dumps({**GOOD, **changes}))
    return [problem.field for problem in caught.value.problems]


def test_a_section_that_says_everything() -> None:
    section = parse(
        json.dumps(
            {
                "source": {"git": {"url": "https://example.org/team/models.git", "ref": "main"}},
                "command": ["python", "train.py", "--epochs", 4],
                "resources": {"processes": 2, "memory": "4GiB", "timeout": "90m", "disk": "500MB"},
                "environment": {"THREADS": 2, "MODE": "fast"},
                "seed": 7,
                "max_attempts": 3,
                "triggers": [{"cron": "0 3 * * 1-5"}],
            }
        )
    )
    assert (section.git_url, section.git_ref, section.path) == ("https://example.org/team/models.git", "main", "")
    assert section.command == ("python", "train.py", "--epochs", "4")
    assert section.resources == Resources(2, 4 * 2**30, 5400, 500_000_000)
    assert section.environment == {"THREADS": "2", "MODE": "fast"}
    assert (section.seed, section.max_attempts) == (7, 3)
    assert section.crons == ("0 3 * * 1-5",)


def test_the_least_that_a_section_says() -> None:
    section = parse(json.dumps(GOOD))
    assert (section.path, section.command, section.resources) == ("examples/flights", ("python", "train.py"), Resources())


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"sauce": 1}, ["train.sauce"]),
        ({"source": {}}, ["train.source"]),
        ({"source": "here"}, ["train.source", "train.source"]),
        ({"source": {"path": "a", "git": {}}}, ["train.source"]),
        ({"source": {"path": "/etc"}}, ["train.source.path"]),
        ({"source": {"path": "a/../../b"}}, ["train.source.path"]),
        ({"source": {"git": {"url": "file:///etc", "ref": "main"}}}, ["train.source.git.url"]),
        ({"source": {"git": {"url": "https://host/repo"}}}, ["train.source.git.ref"]),
        ({"command": "python train.py"}, ["train.command"]),
        ({"command": []}, ["train.command"]),
        ({"command": ["python", ["x"]]}, ["train.command[1]"]),
        ({"resources": {"processes": 0}}, ["train.resources.processes"]),
        ({"resources": {"memory": "4 bananas"}}, ["train.resources.memory"]),
        ({"resources": {"memory": True}}, ["train.resources.memory"]),
        ({"resources": {"memory": "1KiB"}}, ["train.resources.memory"]),
        ({"resources": {"timeout": "0s"}}, ["train.resources.timeout"]),
        ({"resources": {"timeout": "31d"}}, ["train.resources.timeout"]),
        ({"resources": {"gpus": 1}}, ["train.resources.gpus"]),
        ({"resources": {"processes": 2}, "command": ["bash", "x"]}, ["train.command"]),
        ({"environment": {"HEADRACE_TOKEN": "x"}}, ["train.environment.HEADRACE_TOKEN"]),
        ({"environment": {"PATH": "x"}}, ["train.environment.PATH"]),
        ({"environment": {"A-B": "x"}}, ["train.environment.A-B"]),
        ({"environment": {"A": ["x"]}}, ["train.environment.A"]),
        ({"seed": -1}, ["train.seed"]),
        ({"seed": "7"}, ["train.seed"]),
        ({"max_attempts": 21}, ["train.max_attempts"]),
        ({"triggers": ["push", "drift"]}, ["train.triggers[0]", "train.triggers[1]"]),
        ({"triggers": "push"}, ["train.triggers"]),
        ({"triggers": ["push", {"cron": "* * * *"}]}, ["train.triggers[0]", "train.triggers[1].cron"]),
    ],
)
def test_what_is_wrong_is_named_by_its_path(changes: dict[str, Any], fields: list[str]) -> None:
    assert wrong(**changes) == fields


def test_everything_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(Rejected) as caught:
        parse(json.dumps({"seed": "x", "resources": {"memory": "?"}}))
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"train.source", "train.command", "train.seed", "train.resources.memory"}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_what_is_no_section_at_all(text: str) -> None:
    with pytest.raises(Rejected):
        parse(text)


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/team/repo",
        "https://git.example.org:8443/team/repo.git",
    ],
)
def test_git_is_fetched_by_https(url: str) -> None:
    parse(json.dumps({**GOOD, "source": {"git": {"url": url, "ref": "v1.0"}}}))


@pytest.mark.parametrize(
    "url",
    [
        "http://host/repo",
        "git://host/repo",
        "ext::sh -c id",
        "file:///etc/passwd",
        "/etc",
        "../repo",
        "--upload-pack=id",
        "https://user:password@host/repo",
        "https://user@host/repo",
        "https://@host/repo",
        "https:///repo",
        "https://host:0/repo",
        "https://host/" + "x" * 2_000,
        "https://host/\x07",
        "ssh://git@example.org/team/repo.git",
        "git@example.org:team/repo.git",
        "https://host",
        "ssh://-oProxyCommand=id/repo",
        "-oProxyCommand=id@host:repo",
        "git@-oProxyCommand=id:repo",
        "https://host/re po",
        "https://host:99999/repo",
    ],
)
def test_no_other_transport_and_nothing_that_git_or_ssh_takes_for_an_option(url: str) -> None:
    assert wrong(source={"git": {"url": url, "ref": "main"}}) == ["train.source.git.url"]


@pytest.mark.parametrize("ref", ["--upload-pack=id", "a..b", "a b", "x.lock", "refs/heads/main:refs/heads/x"])
def test_a_ref_is_a_branch_a_tag_or_a_commit(ref: str) -> None:
    assert wrong(source={"git": {"url": "https://host/repo", "ref": ref}}) == ["train.source.git.ref"]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@settings(deadline=None)  # a machine may be busy
@given(ANYTHING, st.sampled_from(["source", "command", "resources", "environment", "triggers", "seed", "max_attempts"]))
def test_anything_that_is_json_is_parsed_or_rejected_and_never_breaks(value: Any, field: str) -> None:
    for document in (value, {**GOOD, field: value}):
        assert all(name.startswith("train") for name in problems_of(json.dumps(document)))


def problems_of(text: str) -> list[str]:
    try:
        parse(text)
    except Rejected as exc:
        return [problem.field for problem in exc.problems]
    return []
