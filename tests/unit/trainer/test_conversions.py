"""How a conversion is done: what it fetches, what it tells, and what it does with what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from artifacts import Stored
from servicekit.errors import Invalid, NotFound, Unavailable
from trainer.domain.conversion import Conversion
from trainer.packaging.conversions import MAX_MODEL_BYTES, Conversions
from trainer.packaging.packager import Package
from trainer.ports import StoredBlob, StoredFile

ONE = Conversion("r" * 32, "churn", "m-1", "", "model", ("sklearn",))


def content_of(file: Path) -> bytes:
    return file.read_bytes()


def lay(file: Path, text: str) -> None:
    file.write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Tracker:
    """Keeps what is told."""

    listed: Sequence[StoredFile] = (StoredFile("MLmodel", "k/MLmodel", "a" * 64, 5), StoredFile("data/model.pkl", "k/pkl", "b" * 64, 6))
    told: list[tuple[str, Any]] = field(default_factory=list)
    logs: list[bytes] = field(default_factory=list)
    log_error: Exception | None = None

    async def files(self, conversion: Conversion) -> Sequence[StoredFile]:
        return self.listed

    async def converted(self, conversion: Conversion, blob: StoredBlob, samples: StoredBlob) -> None:
        self.told.append(("converted", (blob, samples)))

    async def refused(self, conversion: Conversion, reason: str) -> None:
        self.told.append(("refused", reason))

    async def store_file(self, run_id: str, path: str, file: Path) -> None:
        if self.log_error is not None:
            raise self.log_error
        self.logs.append(content_of(file))


@dataclass
class Objects:
    """Hands out the key as the content, and keeps what is put."""

    kept: dict[str, bytes] = field(default_factory=dict)
    gone: str = ""

    async def download(self, key: str, path: Path, *, sha256: str) -> None:
        if key == self.gone:
            raise NotFound(f"no {key}")
        lay(path, key)

    async def put(self, key: str, content: Path | bytes, *, sha256: str) -> Any:
        data = content if isinstance(content, bytes) else content_of(content)
        self.kept[key] = data
        return Stored(key=key, size=len(data), sha256=sha256)


@dataclass
class Packages:
    """Converts what it is told to, or raises."""

    error: Exception | None = None
    seen: dict[str, str] = field(default_factory=dict)

    async def package(self, model: Path, flavours: tuple[str, ...], folder: Path, output: Callable[[bytes], None]) -> Package:
        self.seen = tree(model)
        output(b"installing\n")
        if self.error is not None:
            raise self.error
        file = folder / "model.onnx"
        lay(file, "onnx")
        return Package(file, {}, {"inputs": {}, "outputs": {}}, {"largest_difference": 0.0}, b"")


@pytest.fixture
def tracker() -> Tracker:
    return Tracker()


def conversions(tracker: Tracker, tmp_path: Path, packages: Packages | None = None, objects: Objects | None = None) -> Conversions:
    store: Any = objects or Objects()
    return Conversions(tracker, store, packages or Packages(), work_dir=tmp_path)


async def test_the_files_are_laid_out_and_what_comes_out_is_told(tracker: Tracker, tmp_path: Path) -> None:
    packages, objects = Packages(), Objects()
    await conversions(tracker, tmp_path, packages, objects).convert(ONE, last=False)
    assert packages.seen == {"MLmodel": "k/MLmodel", "data/model.pkl": "k/pkl"}
    [(what, (blob, samples))] = tracker.told
    assert what == "converted"
    assert objects.kept[blob.key] == b"onnx"
    assert json.loads(objects.kept[samples.key]) == {"inputs": {}, "outputs": {}}
    assert tracker.logs[0].startswith(b"installing\nconverted, 4 bytes")
    assert tree(tmp_path) == {}


async def test_what_cannot_be_converted_is_refused_with_its_reason(tracker: Tracker, tmp_path: Path) -> None:
    await conversions(tracker, tmp_path, Packages(Invalid("it has no input example"))).convert(ONE, last=False)
    assert tracker.told == [("refused", "it has no input example")]
    assert tracker.logs == [b"installing\nrefused: it has no input example\n"]


async def test_what_may_work_later_is_not_told(tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        await conversions(tracker, tmp_path, Packages(Unavailable("the index is away"))).convert(ONE, last=False)
    assert tracker.told == []
    assert tree(tmp_path) == {}


async def test_the_last_attempt_only_says_that_it_could_not_be_done(tracker: Tracker, tmp_path: Path) -> None:
    packages = Packages()
    await conversions(tracker, tmp_path, packages).convert(ONE, last=True)
    assert [what for what, _ in tracker.told] == ["refused"]
    assert packages.seen == {}


@pytest.mark.parametrize("path", ["../MLmodel", "/etc/passwd", "a//b", "a/./b", "a\x00b", ""])
async def test_no_file_leaves_its_folder(tracker: Tracker, tmp_path: Path, path: str) -> None:
    tracker.listed = [StoredFile(path, "k", "a" * 64, 1)]
    await conversions(tracker, tmp_path).convert(ONE, last=False)
    [(what, reason)] = tracker.told
    assert (what, "cannot be laid out" in reason) == ("refused", True)


async def test_what_is_too_large_or_gone_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    tracker.listed = [StoredFile("MLmodel", "k", "a" * 64, MAX_MODEL_BYTES + 1)]
    await conversions(tracker, tmp_path).convert(ONE, last=False)
    tracker.listed = [StoredFile("MLmodel", "k", "a" * 64, 1)]
    await conversions(tracker, tmp_path, objects=Objects(gone="k")).convert(ONE, last=False)
    assert [what for what, _ in tracker.told] == ["refused", "refused"]
    assert "is gone" in tracker.told[1][1]


async def test_a_log_that_nobody_takes_keeps_no_result_back(tracker: Tracker, tmp_path: Path) -> None:
    tracker.log_error = NotFound("the run is deleted")
    await conversions(tracker, tmp_path).convert(ONE, last=False)
    assert [what for what, _ in tracker.told] == ["converted"]
