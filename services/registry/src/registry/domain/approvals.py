"""Requests for approval: each binds a version, an evaluation and a revision of the delivery; one vote per person, none by the author."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from registry.domain.errors import Malformed, NotAllowed, Refused

MAX_COMMENT = 2_000


class ApprovalStatus(StrEnum):
    """Pending until enough approve, one rejects, or something newer takes its place."""

    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class Vote:
    """What one person said."""

    subject: str
    approve: bool
    comment: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Approval:
    """A request for `needed` approvals."""

    approval_id: UUID
    model_id: UUID
    model: str
    version: int
    evaluation_id: str
    delivery: str
    delivery_revision: int
    author: str
    needed: int
    requested_at: datetime
    status: ApprovalStatus = ApprovalStatus.PENDING
    votes: tuple[Vote, ...] = ()

    def vote(self, vote: Vote) -> Approval:
        """With one vote more; itself when this person said the same before.

        One rejection rejects. Raises Refused when it is no longer pending or the person voted otherwise, NotAllowed for the author.
        """
        if len(vote.comment) > MAX_COMMENT:
            raise Malformed(f"a comment may have {MAX_COMMENT} characters at most")
        if vote.subject == self.author:
            raise NotAllowed(f"{vote.subject} made this version and may not vote on it")
        earlier = next((given for given in self.votes if given.subject == vote.subject), None)
        if earlier is not None:
            if earlier.approve == vote.approve:
                return self
            raise Refused(f"{vote.subject} has voted already")
        if self.status is not ApprovalStatus.PENDING:
            raise Refused(f"this request is {self.status}")
        votes = (*self.votes, vote)
        if not vote.approve:
            return replace(self, votes=votes, status=ApprovalStatus.REJECTED)
        enough = sum(given.approve for given in votes) >= self.needed
        return replace(self, votes=votes, status=ApprovalStatus.APPROVED if enough else ApprovalStatus.PENDING)

    def withdraw(self) -> Approval:
        """Withdrawn; only for a pending request."""
        if self.status is not ApprovalStatus.PENDING:
            raise Refused(f"this request is {self.status}")
        return replace(self, status=ApprovalStatus.WITHDRAWN)
