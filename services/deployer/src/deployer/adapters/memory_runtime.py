"""A runtime in memory for tests: keeps what it is given, answers by a function, and can be told to refuse, to die or to be away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from servicekit.errors import Unavailable

from deployer.domain.signature import Rows, Signature
from deployer.ports import LoadTooSlow, Refused, RuntimeLost

Answer = Callable[[bytes, Rows], Rows]


@dataclass
class MemoryRuntime:
    """`answer` computes the outputs of a model's bytes; it may raise ValueError with what a runtime would say."""

    answer: Answer
    name: str = "triton"
    upstream: str = "127.0.0.1:1"
    loaded: dict[str, bytes] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    away: bool = False
    dies_of: bytes | None = None
    refuses: Callable[[bytes], str | None] = lambda content: None
    slow: int = 0
    """How many of the next loads take too long. The last of them is done all the same, when nobody waits for it any more."""

    async def load(self, model: str, content: bytes, signature: Signature) -> None:
        self._here()
        self.calls.append(("load", model))
        if model in self.loaded:
            return
        if content == self.dies_of:
            self.restart()
            raise RuntimeLost(f"the runtime went away while it loaded {model}")
        if reason := self.refuses(content):
            raise Refused(reason)
        if self.slow:
            self.slow -= 1
            if not self.slow:
                self.loaded[model] = content
            raise LoadTooSlow(f"the runtime has not loaded {model} within 0 s")
        self.loaded[model] = content

    async def unload(self, model: str) -> None:
        self._here()
        self.calls.append(("unload", model))
        self.loaded.pop(model, None)

    async def infer(self, model: str, inputs: Rows, signature: Signature) -> Rows:
        self._here()
        if model not in self.loaded:
            raise Refused(f"unknown model {model}")
        try:
            return self.answer(self.loaded[model], inputs)
        except ValueError as error:
            raise Refused(str(error)) from error

    async def models(self) -> frozenset[str]:
        self._here()
        return frozenset(self.loaded)

    async def close(self) -> None:
        """There is nothing to let go of."""

    def restart(self) -> None:
        """Lose everything, as a runtime does that starts again."""
        self.loaded.clear()

    def _here(self) -> None:
        if self.away:
            raise Unavailable("the runtime is away")
