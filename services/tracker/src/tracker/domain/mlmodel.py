"""What MLflow's client writes beside a model: its MLmodel file and its input example. Texts of strangers: bounded, and never run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from tracker.domain.artifact import check_path
from tracker.domain.errors import Problem, Rejected
from tracker.domain.model import MAX_SAMPLE_ROWS, Signature, check_inputs

MAX_MLMODEL_BYTES = 1_000_000
MLMODEL = "MLmodel"

_MAX_FLAVORS = 100
_MAX_DEPTH = 50
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class MlModel:
    """The ONNX file of a model and its input example, as paths beside the MLmodel file; "" for what it has not. `flavors` are by name."""

    file: str
    example: str
    flavors: tuple[str, ...]


def read_mlmodel(data: bytes) -> MlModel:
    """Reads an MLmodel file. Raises Rejected, with the reason, when it is none. Blocks."""
    try:
        document = _load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refused(f"its MLmodel file cannot be read: {str(error).splitlines()[0][:200]}") from None
    flavors = document.get("flavors") if isinstance(document, dict) else None
    if not isinstance(flavors, dict) or not flavors or len(flavors) > _MAX_FLAVORS:
        raise _refused("its MLmodel file names no flavors")
    names = tuple(sorted(str(name)[:50] for name in flavors if name != "python_function")) or ("python_function",)
    onnx = flavors.get("onnx")
    info = document.get("saved_input_example_info")
    example = info.get("serving_input_path") if isinstance(info, dict) else None
    file = _path("its ONNX file", onnx.get("data")) if isinstance(onnx, dict) else ""
    return MlModel(file, _path("its input example", example) if example else "", names)


def sample_inputs(data: bytes, signature: Signature) -> bytes:
    """An input example as sample rows: JSON {"inputs": {name: rows}, "outputs": {}}, since MLflow keeps no outputs of it.

    It is an array for the only input, an object of arrays, or a data frame whose columns are inputs, or the values of the only one.
    Raises Rejected, with the reason, when it does not fit. Blocks.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _refused("it is not JSON") from None
    if not isinstance(document, dict):
        raise _refused("it is no object")
    frame = document.get("dataframe_split")
    given = document.get("inputs", document.get("instances"))
    if isinstance(frame, dict):
        inputs = _of_frame(frame, signature)
    elif isinstance(given, list):
        inputs = _alone(signature, given)
    elif isinstance(given, dict):
        inputs = dict(given)
    else:
        raise _refused("it has neither inputs nor dataframe_split")
    inputs = {name: rows[:MAX_SAMPLE_ROWS] if isinstance(rows, list) else rows for name, rows in inputs.items()}
    check_inputs(inputs, signature)
    return json.dumps({"inputs": inputs, "outputs": {}}, separators=(",", ":")).encode()


def _of_frame(frame: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    columns, rows = frame.get("columns"), frame.get("data")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise _refused("its rows are no lists")
    names = [tensor.name for tensor in signature.inputs]
    if not isinstance(columns, list) or set(map(str, columns)) != set(names):
        return _alone(signature, rows)
    if any(len(row) != len(columns) for row in rows):
        raise _refused("its rows have different lengths")
    at = {str(name): index for index, name in enumerate(columns)}
    return {
        tensor.name: [[row[at[tensor.name]]] if len(tensor.shape) == 2 else row[at[tensor.name]] for row in rows]
        for tensor in signature.inputs
    }


def _alone(signature: Signature, rows: list[Any]) -> dict[str, Any]:
    if len(signature.inputs) != 1:
        names = ", ".join(tensor.name for tensor in signature.inputs)
        raise _refused(f"it does not name the model's inputs, which are {names[:500]}")
    return {signature.inputs[0].name: rows}


def _path(what: str, path: Any) -> str:
    if not isinstance(path, str) or check_path(path):
        raise _refused(f"{what} has no path that is right")
    return path


def _load(data: bytes) -> Any:
    """The plain values of a YAML text. Raises yaml.YAMLError, ValueError.

    Aliases are refused: a few lines of them can stand for more than any memory holds. So is a deep nesting, before anything is built of
    it: the loader written in C would overflow its stack, and end the process.
    """
    depth = 0
    for event in yaml.parse(data, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise yaml.YAMLError(f"it is nested deeper than {_MAX_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return yaml.load(data, Loader=_LOADER)  # noqa: S506  # a safe one: it makes plain values only


def _refused(reason: str) -> Rejected:
    return Rejected([Problem("model", reason)])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
