"""What the handlers need from the world outside: a runtime that serves models. Stores and clocks are adapters of the service itself."""

from __future__ import annotations

from typing import Protocol

from servicekit.errors import Invalid, Transient

from deployer.domain.signature import Rows, Signature


class Refused(Invalid):
    """The runtime does not take this model; the message is the runtime's own."""


class RuntimeLost(Transient):
    """The runtime went away while it was loading: the model may have been the reason."""


class Runtime(Protocol):
    """A server that loads models under names given by us and answers inference requests.

    Every method may be repeated. All raise Unavailable when the runtime cannot be reached and DeadlineExceeded when it takes too long.
    """

    @property
    def name(self) -> str:
        """What deliveries call it, such as `triton`."""
        ...

    @property
    def upstream(self) -> str:
        """The address (`host:port`) at which gateways reach it."""
        ...

    async def load(self, model: str, content: bytes, signature: Signature) -> None:
        """Load an ONNX model under a name. When the name is loaded already, it is unloaded first: a name always means these bytes.

        Raises Refused, or RuntimeLost when the runtime died of it.
        """
        ...

    async def unload(self, model: str) -> None:
        """Unload a model, and return when it is gone. Nothing happens when it is not loaded."""
        ...

    async def infer(self, model: str, inputs: Rows, signature: Signature) -> Rows:
        """Answer rows: the proof that a model is ready. Raises Refused when the model answers with an error or is not there."""
        ...

    async def models(self) -> frozenset[str]:
        """The names of all models that are loaded."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
