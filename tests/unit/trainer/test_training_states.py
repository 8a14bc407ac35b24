"""A training from its submission to its end, as plain Python."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from trainer.domain import training as rules
from trainer.domain.errors import Refused, Rejected
from trainer.domain.training import Event, Request, Resources, Source, Status, Training

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def new(**changes: object) -> Training:
    fields: dict[str, object] = {
        "training_id": "t",
        "status": Status.QUEUED,
        "delivery": "",
        "experiment": "Default",
        "source": Source(upload_id="u"),
        "command": ("python", "train.py"),
        "environment": {},
        "resources": Resources(),
        "seed": 0,
        "run_name": "",
        "submitted_by": "ada",
        "max_attempts": 1,
        "created_at": NOW,
    }
    return Training(**{**fields, **changes})  # type: ignore[arg-type]  # fields by name


def test_every_event_is_counted_and_a_new_attempt_forgets_the_old_reason() -> None:
    events: list[Event] = []
    training, event = new(max_attempts=2).submitted()
    events.append(event)
    training, started = training.started(1, "r1")
    events.append(started)
    assert training.may_retry()
    training = training.waiting("exit code 1", users_fault=True)
    assert (training.status, training.reason, training.failures) == (Status.QUEUED, "exit code 1", 1)
    assert not training.may_retry()
    training, started = training.started(2, "r2")
    events.append(started)
    assert (training.run_id, training.attempt, training.reason) == ("r2", 2, "")
    training, succeeded = training.succeeded(NOW)
    events.append(succeeded)
    assert [one.training.event_sequence for one in events] == [1, 2, 3, 4]
    assert (training.status, training.finished_at) == (Status.SUCCEEDED, NOW)


def test_what_failed_around_the_code_is_not_the_codes_failure() -> None:
    training = new(max_attempts=2).waiting("its trainer died", users_fault=False).waiting("S3 was away", users_fault=False)
    assert training.failures == 0
    assert training.may_retry()


def test_nothing_happens_after_the_end() -> None:
    for ended in (new().succeeded(NOW)[0], new().failed(NOW, "x")[0], new().cancelled(NOW, "ada")[0]):
        with pytest.raises(Refused, match="has ended"):
            ended.started(2, "r")
        with pytest.raises(Refused):
            ended.succeeded(NOW)
        with pytest.raises(Refused):
            ended.failed(NOW, "y")
        with pytest.raises(Refused):
            ended.cancelled(NOW, "eve")
        with pytest.raises(Refused):
            ended.waiting("z", users_fault=False)


def test_an_attempt_that_comes_late_is_refused() -> None:
    training = new().started(3, "r3")[0]
    with pytest.raises(Refused, match="attempt 3"):
        training.started(2, "r2")


def test_a_reason_is_cut_to_a_length_that_can_be_told() -> None:
    assert len(new().failed(NOW, "x" * 100_000)[0].reason) == rules.MAX_REASON


def test_what_a_request_leaves_out_is_filled() -> None:
    assert Resources(processes=4).over(Resources(1, 2, 3, 4)) == Resources(4, 2, 3, 4)


def test_everything_wrong_with_a_request_is_told_at_once() -> None:
    rules.check_request(Request(source=Source(upload_id="u"), command=("x",)))
    with pytest.raises(Rejected) as caught:
        rules.check_request(
            Request(
                source=Source(upload_id="u", git_url="https://host/r"),
                command=("",),
                environment={"HOME": "x", "1": "y"},
                resources=Resources(-1, 5, -1, 5),
                seed=-1,
                max_attempts=99,
                run_name="nul\x00",
            )
        )
    assert [problem.field for problem in caught.value.problems] == [
        "source",
        "command[0]",
        "environment.HOME",
        "environment.1",
        "resources.processes",
        "resources.memory",
        "resources.timeout",
        "resources.disk",
        "seed",
        "max_attempts",
        "run_name",
    ]


@pytest.mark.parametrize(
    "source",
    [
        Source(git_url="https://host/r", git_ref="main", diff="x"),
        Source(upload_id="u", commit="not hex!"),
        Source(upload_id="u", diff="\x00"),
        Source(),
    ],
)
def test_sources_that_contradict_themselves(source: Source) -> None:
    assert rules.check_source("source", source)


def test_a_source_is_told_apart_from_none_and_a_good_one_has_nothing_wrong() -> None:
    good = [Source(upload_id="u", commit="abc123", dirty=True, diff="x"), Source(git_url="https://host/r", git_ref="main")]
    for source in good:
        assert source
        assert rules.check_source("source", source) == []
    assert not Source()
    assert [problem.field for problem in rules.check_source("source", Source(upload_id="u", diff="x" * (rules.MAX_DIFF + 1)))] == [
        "source.diff"
    ]
    assert [problem.field for problem in rules.check_source("source", Source(upload_id="u", commit="a" * 65))] == ["source.commit"]


@pytest.mark.parametrize(
    ("command", "processes", "fields"),
    [
        ((), 1, ["command"]),
        (("x",) * (rules.MAX_WORDS + 1), 1, ["command"]),
        (("x", "y" * (rules.MAX_WORD + 1), "\x00"), 1, ["command[1]", "command[2]"]),
        (("python", "train.py"), 2, []),
        (("python3", "-m", "train"), 2, []),
        (("python", "-c", "1"), 2, ["command"]),
        (("sh", "train.sh"), 2, ["command"]),
        (("sh", "train.sh"), 1, []),
    ],
)
def test_commands(command: tuple[str, ...], processes: int, fields: list[str]) -> None:
    assert [problem.field for problem in rules.check_command("command", command, processes)] == fields


@pytest.mark.parametrize(
    ("environment", "fields"),
    [
        ({"A": "x" * rules.MAX_WORD, "_b1": ""}, []),
        ({"A": "x" * (rules.MAX_WORD + 1)}, ["environment.A"]),
        ({"A": "\x00"}, ["environment.A"]),
        ({"A-B": ""}, ["environment.A-B"]),
        ({"A" * 201: ""}, ["environment." + "A" * 50]),
        ({"HEADRACE_TOKEN": ""}, ["environment.HEADRACE_TOKEN"]),
        ({"https_proxy": "", "NO_PROXY": "*"}, ["environment.https_proxy", "environment.NO_PROXY"]),
        ({f"A{number}": "" for number in range(rules.MAX_VARIABLES + 1)}, ["environment"]),
    ],
)
def test_environments(environment: dict[str, str], fields: list[str]) -> None:
    assert [problem.field for problem in rules.check_environment("environment", environment)] == fields
