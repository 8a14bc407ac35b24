"""The trainer's use cases: submitting, watching and cancelling trainings, and what becomes of their attempts. No SQL, protobuf or Kafka."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime

from artifacts import ArtifactStore
from servicekit.access import Caller
from servicekit.clock import Clock, Ids
from servicekit.errors import Conflict, Invalid, NotFound, TooLarge, Violation
from servicekit.paging import page_size

from trainer.domain import training as rules
from trainer.domain.errors import Problem, Refused, Rejected
from trainer.domain.schedule import last_due
from trainer.domain.section import TrainSection, parse
from trainer.domain.training import Event, Request, Resources, Source, Status, Training
from trainer.ports import AppliedDelivery, Logs, RequestKey, Store, UnitOfWork, Upload

LOG_CHUNK = 64 * 1024
_FOLLOW_S = 0.2
_log = logging.getLogger(__name__)

SCHEDULE = "schedule"
"""What starts the trainings of cron triggers."""

INFRASTRUCTURE_ATTEMPTS = 5
"""Attempts beyond those that the user's code may fail: for a trainer that died, or servers that were away."""


@contextmanager
def told() -> Iterator[None]:
    """Turns the domain's errors into the kinds that every service shares."""
    try:
        yield
    except Rejected as exc:
        raise Invalid("the input is not valid", [Violation(problem.field, problem.message) for problem in exc.problems]) from exc
    except Refused as exc:
        raise Conflict(str(exc)) from exc


class _AlreadySubmitted(Exception):
    """Undoes the transaction of a request that another one has answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ticket:
    """Where to PUT a packed source folder; `url` is empty when its content is there already."""

    upload_id: str
    url: str


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt. `users_fault`: the user's code failed, not what it runs on."""

    succeeded: bool
    reason: str = ""
    users_fault: bool = False


class Trainer:
    """Trainings, their sources and the deliveries they come from."""

    def __init__(
        self,
        store: Store,
        objects: ArtifactStore,
        logs: Logs,
        clock: Clock,
        ids: Ids,
        *,
        defaults: Resources,
        most: Resources,
        max_attempts: int,
        max_source_bytes: int,
        url_ttl_s: int,
    ) -> None:
        """`defaults` fill what a request leaves out; `most` is what a training may have at most (0: no limit)."""
        self._store = store
        self._objects = objects
        self._logs = logs
        self._clock = clock
        self._ids = ids
        self._defaults = defaults
        self._most = most
        self._max_attempts = max_attempts
        self._max_source_bytes = max_source_bytes
        self._url_ttl_s = url_ttl_s

    # -- for users

    async def submit(self, caller: Caller, request: Request, request_id: str) -> Training:
        """Queues a training. What the request leaves out comes from the delivery's train section. With a request id that this caller
        gave before it answers that training.

        Raises NotFound for an unknown delivery or upload, Invalid with all that is wrong with the request.
        """
        if request.source.upload_id:
            await self._verify_upload(caller, request.source.upload_id)
        return await self._submit(caller.name, request, request_id)

    async def _submit(self, submitter: str, request: Request, request_id: str, started_by: str = "") -> Training:
        if len(request_id) > 500 or "\x00" in request_id:
            raise Invalid("the input is not valid", [Violation("request_id", "at most 500 characters")])
        key = RequestKey(started_by or submitter, request_id) if request_id else None
        async with self._store.transaction() as work:
            if key is not None and (known := await work.trainings.by_request(key)):
                return known
            request = await self._completed(work, request)
        with told():
            rules.check_request(request)
            self._check_most(request.resources)
        training, event = Training(
            training_id=str(self._ids.uuid7()),
            status=Status.QUEUED,
            delivery=request.delivery,
            experiment=request.experiment or "Default",
            source=request.source,
            command=tuple(request.command),
            environment=dict(request.environment),
            resources=request.resources.over(self._defaults),
            seed=request.seed,
            run_name=request.run_name,
            submitted_by=submitter,
            max_attempts=request.max_attempts or self._max_attempts,
            created_at=self._clock.now(),
            started_by=started_by,
        ).submitted()
        try:
            async with self._store.transaction() as work:
                job_id = await work.jobs.enqueue(training.training_id, training.max_attempts + INFRASTRUCTURE_ATTEMPTS - 1)
                training = dataclasses.replace(training, job_id=job_id)
                if not await work.trainings.add(training, key):
                    raise _AlreadySubmitted
                await work.emit(event)
            return training
        except _AlreadySubmitted:
            # The same request came twice at once; this one is undone, its job with it.
            async with self._store.transaction() as work:
                known = await work.trainings.by_request(key) if key is not None else None
            return _found(known, f"of request {request_id}")

    async def get(self, training_id: str) -> Training:
        async with self._store.transaction() as work:
            return _found(await work.trainings.get(training_id), training_id)

    async def page(self, delivery: str, before: str, limit: int) -> Sequence[Training]:
        """Newest first, those older than training `before`."""
        async with self._store.transaction() as work:
            return await work.trainings.page(delivery, before, page_size(limit))

    async def cancel(self, caller: Caller, training_id: str) -> Training:
        """Cancels a training at any time: one that waits at once, one that runs within seconds. What has ended stays as it ended."""
        async with self._store.transaction() as work:
            job_id = _found(await work.trainings.get(training_id), training_id).job_id
            # The job is taken before the training, in the same order as by those who end an attempt: they never wait in a circle.
            waited = await work.jobs.cancel(job_id)
            training = _found(await work.trainings.lock(training_id), training_id)
            if training.ended:
                return training
            if waited:
                training, event = training.cancelled(self._clock.now(), caller.name)
                await work.emit(event)
            else:
                training = dataclasses.replace(training, cancelled_by=training.cancelled_by or caller.name)
            await work.trainings.save(training)
            return training

    async def stream_log(self, training_id: str, offset: int, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
        """The log from `offset` on, in pieces with their offsets; with `follow` until the training has ended."""
        if offset < 0:
            raise Invalid("the input is not valid", [Violation("offset", "0 or more")])
        while True:
            # Asked before reading: what is written before the end is then read after it.
            ended = (await self.get(training_id)).ended
            while data := await self._logs.read(training_id, offset, LOG_CHUNK):
                yield offset, data
                offset += len(data)
            if ended or not follow:
                return
            await self._clock.sleep(_FOLLOW_S)

    async def start_source_upload(self, caller: Caller, sha256: str, size_bytes: int) -> Ticket:
        """Says where to PUT a packed folder. What this caller has uploaded before is not asked for again."""
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise Invalid("the input is not valid", [Violation("sha256", "64 lower-case hexadecimal digits")])
        if size_bytes > self._max_source_bytes:
            raise TooLarge(f"a packed source folder has at most {self._max_source_bytes} bytes, this one {size_bytes}")
        if size_bytes < 1:
            raise Invalid("the input is not valid", [Violation("size_bytes", "1 or more")])
        upload_id = str(self._ids.uuid7())
        new = Upload(upload_id, caller.name, f"sources/{upload_id}.tar.gz", size_bytes, sha256, verified=False)
        async with self._store.transaction() as work:
            upload = await work.uploads.add(new)
        if upload.size_bytes != size_bytes:
            raise Invalid("the input is not valid", [Violation("size_bytes", f"this content has {upload.size_bytes} bytes")])
        url = "" if upload.verified else await self._objects.presign_put(upload.key, self._url_ttl_s)
        return Ticket(upload.upload_id, url)

    # -- for the registry and its deliveries

    def validate_section(self, section_json: str) -> list[Problem]:
        """What is wrong with a train section; each field is a path from the top of the file."""
        try:
            section = parse(section_json)
            self._check_most(section.resources, "train.")
        except Rejected as exc:
            return list(exc.problems)
        return []

    async def remember(self, delivery: AppliedDelivery) -> None:
        """Keeps what a delivery says; the highest revision counts, whatever comes last."""
        async with self._store.transaction() as work:
            await work.deliveries.remember(delivery)

    async def start_scheduled(self) -> int:
        """Submits what the cron triggers of deliveries have made due since the last look; returns how many trainings that are.

        Several replicas may look at once, and a look may be repeated: the time it is due names the request. What was due longer ago
        than an hour is passed over, and a delivery that is new starts to count now.
        """
        now = self._clock.now()
        async with self._store.transaction() as work:
            deliveries = await work.deliveries.scheduled()
        count = 0
        for delivery, looked_at in deliveries:
            try:
                section = parse(delivery.train_json)
            except Rejected as exc:
                _log.warning("the train section of delivery %s is not right: %s", delivery.name, exc)
                continue
            due = [last_due(cron, looked_at, now) for cron in section.crons] if looked_at is not None else []
            for at in sorted({minute for minute in due if minute is not None}):
                count += await self._start_due(delivery, section, at)
            if section.crons:
                async with self._store.transaction() as work:
                    await work.deliveries.looked_at(delivery.name, now)
        return count

    async def _start_due(self, delivery: AppliedDelivery, section: TrainSection, at: datetime) -> int:
        source, author = Source(), delivery.applied_by
        if not section.git_url:
            # A folder is on its user's machine: it is trained again as it was last uploaded.
            async with self._store.transaction() as work:
                source = await work.trainings.last_upload(delivery.name) or source
                upload = await work.uploads.get(source.upload_id) if source.upload_id else None
                author = upload.uploaded_by if upload is not None else author
        if not author:
            # Anybody could approve what has no author. The registry tells its deliveries again, with who applied them.
            _log.warning("delivery %s was due at %s and is not trained: it is not known who applied it", delivery.name, at)
            return 0
        request = Request(delivery=delivery.name, source=source)
        try:
            # The author is a person, who may not approve what comes of it: the schedule only starts it.
            training = await self._submit(author, request, f"cron:{delivery.name}:{at.isoformat()}", SCHEDULE)
        except Invalid as exc:
            _log.warning("delivery %s was due at %s and cannot be trained: %s", delivery.name, at, exc)
            return 0
        _log.info("training %s of delivery %s, due at %s", training.training_id, delivery.name, at)
        return 1

    # -- for those who run the attempts

    async def began(self, training_id: str, attempt: int, run_id: str) -> Training:
        """One attempt began. Raises Conflict when the training has ended or a newer attempt has begun."""
        async with self._store.transaction() as work:
            training = _found(await work.trainings.lock(training_id), training_id)
            if (training.attempt, training.run_id) == (attempt, run_id):
                return training
            with told():
                training, event = training.started(attempt, run_id)
            await work.trainings.save(training)
            await work.emit(event)
            return training

    async def ended(self, work: UnitOfWork, training_id: str, attempt: int, state: str, outcome: Outcome) -> None:
        """Draws the consequences of an attempt's end in the transaction that ends its job. `state` is what became of the job:
        succeeded, failed, cancelled, or queued to be tried again."""
        training = await work.trainings.lock(training_id)
        if training is None or training.ended:
            return
        # One that failed before it had a run has not said that it began.
        training = dataclasses.replace(training, attempt=max(training.attempt, attempt))
        now = self._clock.now()
        event: Event
        if state == "succeeded":
            training, event = training.succeeded(now)
        elif state == "failed":
            training, event = training.failed(now, outcome.reason)
        elif state == "cancelled":
            training, event = training.cancelled(now, training.cancelled_by or "an operator")
        else:
            await work.trainings.save(training.waiting(outcome.reason, users_fault=outcome.users_fault))
            return
        await work.trainings.save(training)
        await work.emit(event)

    async def upload_of(self, source: Source) -> Upload | None:
        """The upload that a source names."""
        if not source.upload_id:
            return None
        async with self._store.transaction() as work:
            return await work.uploads.get(source.upload_id)

    async def _completed(self, work: UnitOfWork, request: Request) -> Request:
        if not request.delivery:
            return request
        delivery = await work.deliveries.get(request.delivery)
        if delivery is None or delivery.deleted:
            raise NotFound(f"there is no delivery {request.delivery}")
        if not delivery.train_json:
            return dataclasses.replace(request, experiment=request.experiment or delivery.experiment)
        with told():
            section = parse(delivery.train_json)
        if not request.source and not section.git_url:
            raise Invalid(
                "the input is not valid",
                [Violation("source", f"delivery {delivery.name} trains from the folder {section.path}: it must be uploaded")],
            )
        return _over(request, section, delivery.experiment)

    async def _verify_upload(self, caller: Caller, upload_id: str) -> None:
        async with self._store.transaction() as work:
            upload = await work.uploads.get(upload_id)
        if upload is None or upload.uploaded_by != caller.name:
            raise NotFound(f"there is no upload {upload_id}")
        if upload.verified:
            return
        try:
            arrived = await self._objects.digest(upload.key)
        except NotFound:
            raise Conflict(f"nothing was uploaded for {upload_id}") from None
        if (arrived.size, arrived.sha256) != (upload.size_bytes, upload.sha256):
            raise Invalid(
                "the bytes that arrived are not those that were announced",
                [Violation("source.upload_id", f"{upload.sha256} was announced, {arrived.sha256} arrived")],
            )
        async with self._store.transaction() as work:
            await work.uploads.verified(upload_id)

    def _check_most(self, resources: Resources, prefix: str = "") -> None:
        problems = [
            Problem(f"{prefix}resources.{name}", f"at most {most} here")
            for name, asked, most in (
                ("processes", resources.processes, self._most.processes),
                ("memory", resources.memory_bytes, self._most.memory_bytes),
                ("timeout", resources.timeout_seconds, self._most.timeout_seconds),
                ("disk", resources.disk_bytes, self._most.disk_bytes),
            )
            if most and asked > most
        ]
        if problems:
            raise Rejected(problems)


def _found(training: Training | None, training_id: str) -> Training:
    if training is None:
        raise NotFound(f"there is no training {training_id}")
    return training


def _over(request: Request, section: TrainSection, experiment: str) -> Request:
    """The request, and what it leaves out from the section."""
    environment: Mapping[str, str] = {**section.environment, **request.environment}
    return dataclasses.replace(
        request,
        experiment=request.experiment or experiment,
        source=request.source or Source(git_url=section.git_url, git_ref=section.git_ref),
        command=request.command or section.command,
        environment=environment,
        resources=request.resources.over(section.resources),
        seed=request.seed or section.seed,
        max_attempts=request.max_attempts or section.max_attempts,
    )
