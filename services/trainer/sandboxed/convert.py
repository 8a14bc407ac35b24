"""Runs in the sandbox, in an environment of the model's own requirements and the converters: MLflow model folder in, ONNX out.

    python convert.py MODEL OUT

OUT gets `model.onnx` and `package.json`: the signature in the words of the Open Inference Protocol V2, sample rows with the answers of
the model as it was logged, and how far ONNX is from them. A model that cannot be converted leaves `package.json` with the reason alone,
and exit code 3. Nothing of Headrace is imported: this file is all that the sandbox sees of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort

OPSET = 18
IR_VERSION = 9
"""What the runtimes read."""

MAX_ROWS = 100
"""Sample rows, of those that the input example has."""

RTOL, ATOL = 1e-3, 1e-4
"""How far an answer may be from the original's: ONNX computes trees and networks in single precision."""

REFUSED = 3
INPUT = "input"

_V2 = {"float32": "FP32", "float64": "FP64", "float16": "FP16", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
       "uint8": "UINT8", "bool": "BOOL"}  # fmt: skip

Array = np.ndarray[Any, Any]


class Refused(Exception):
    """The model cannot be converted; the message tells its author why, and what would help."""


@dataclass(frozen=True)
class Converted:
    """An ONNX model and what the original answers to the example: tensors by name, rows first, in the order to be declared."""

    model: onnx.ModelProto
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


def main(model: Path, out: Path) -> int:
    """Converts, compares, writes. Returns the exit code."""
    try:
        converted = convert(model)
        worst = compare(converted)
        package = describe(converted, worst)
    except Refused as why:
        (out / "package.json").write_text(json.dumps({"refused": str(why)}))
        return REFUSED
    (out / "model.onnx").write_bytes(converted.model.SerializeToString())
    (out / "package.json").write_text(json.dumps(package, allow_nan=False))
    return 0


def convert(folder: Path) -> Converted:
    """The model of a folder as ONNX, by the flavour that it was logged in. Raises Refused."""
    from mlflow.models import Model

    logged = Model.load(str(folder))
    flavours: dict[str, Callable[[Path, Any], Converted]] = {
        "sklearn": _sklearn,
        "xgboost": _xgboost,
        "lightgbm": _lightgbm,
        "pytorch": _pytorch,
    }
    for name, convert_flavour in flavours.items():
        if name in logged.flavors:
            example = _example(logged, folder)
            try:
                return _any_batch(convert_flavour(folder, example))
            except Refused:
                raise
            except Exception as error:
                # Whatever a converter or the model's own code raises is the author's to read.
                raise Refused(f"it cannot be converted from {name}: {type(error).__name__}: {str(error)[:1_000]}") from error
    known = ", ".join(flavours)
    raise Refused(f"it was logged as {', '.join(logged.flavors) or 'nothing'}; what can be converted are onnx, {known}")


def compare(converted: Converted) -> float:
    """The largest difference between ONNX and the original on the example. Raises Refused when an answer is too far away."""
    try:
        answers = _session(converted.model).run(list(converted.outputs), dict(converted.inputs))
    except Exception as error:  # onnxruntime has no base class of its own for what it says of a model
        raise Refused(f"as ONNX it does not run: {str(error)[:1_000]}") from error
    worst = 0.0
    for (name, expected), answer in zip(converted.outputs.items(), answers, strict=True):
        got = np.asarray(answer)
        if got.shape != expected.shape:
            raise Refused(f"as ONNX its output {name} has the shape {list(got.shape)} where it had {list(expected.shape)}")
        if expected.dtype.kind not in "fiub":
            same = got.astype(str) == expected.astype(str)
        else:
            left, right = got.astype(np.float64), expected.astype(np.float64)
            same = np.isclose(left, right, rtol=RTOL, atol=ATOL, equal_nan=True)
            finite = np.isfinite(left) & np.isfinite(right)
            worst = max(worst, float(np.max(np.abs(left - right)[finite], initial=0.0)))
        if not same.all():
            rows = np.flatnonzero(~same.reshape(len(same), -1).all(axis=1))
            raise Refused(
                f"as ONNX it answers otherwise: {len(rows)} of {len(same)} rows of the input example differ in {name}, "
                f"first row {rows[0]}: {got[rows[0]].tolist()} where it answered {expected[rows[0]].tolist()}"
            )
    return worst


def describe(converted: Converted, worst: float) -> dict[str, Any]:
    """Signature, samples and parity as JSON."""
    sides = {"inputs": converted.inputs, "outputs": converted.outputs}
    return {
        "signature": {
            side: [{"name": name, "datatype": _datatype(array), "shape": [-1, *array.shape[1:]]} for name, array in tensors.items()]
            for side, tensors in sides.items()
        },
        "samples": {side: {name: _rows(name, array) for name, array in tensors.items()} for side, tensors in sides.items()},
        "parity": {"rows": len(next(iter(converted.inputs.values()))), "worst": worst, "rtol": RTOL, "atol": ATOL},
    }


# One function per flavour


def _sklearn(folder: Path, example: Any) -> Converted:
    import mlflow.sklearn

    model = mlflow.sklearn.load_model(str(folder))
    _know_boosters()
    inputs = _tensors(example)
    return _answered(_first_that_runs(model, inputs), inputs, model, example, hasattr(model, "predict_proba"))


def _first_that_runs(model: Any, inputs: Mapping[str, Array]) -> onnx.ModelProto:
    """With its columns as they are; else in single precision, since the converter does not cast columns of several types that meet, as
    scikit-learn does; else as one matrix, which an estimator takes that looks at no names."""
    numbers = {name: array for name, array in inputs.items() if array.dtype.kind in "fiub"}
    single = {name: array.astype(np.float32) if name in numbers else array for name, array in inputs.items()}
    ways: list[Callable[[], onnx.ModelProto]] = [lambda: _skl(model, inputs), lambda: _cast_before(_skl(model, single), numbers)]
    if len(numbers) == len(inputs) > 1:
        matrix = {INPUT: np.concatenate(list(single.values()), axis=1)}
        ways.append(lambda: _cast_before(_columns_before(_skl(model, matrix), list(inputs)), numbers))
    failures: list[Exception] = []
    for way in ways:
        try:
            made = way()
            _session(made)
        except Exception as error:  # what skl2onnx and onnxruntime raise has no base class of their own
            failures.append(error)
        else:
            return made
    raise failures[-1] if len(failures) > 2 else failures[0]


def _skl(model: Any, inputs: Mapping[str, Array]) -> onnx.ModelProto:
    from skl2onnx import convert_sklearn

    options: Any = {id(model): {"zipmap": False}} if hasattr(model, "predict_proba") else None
    types = [(name, _skl_type(array)) for name, array in inputs.items()]
    made = convert_sklearn(model, initial_types=types, options=options, target_opset={"": OPSET, "ai.onnx.ml": 3})
    made.ir_version = IR_VERSION
    return cast(onnx.ModelProto, made)


def _xgboost(folder: Path, example: Any) -> Converted:
    import mlflow.xgboost
    from onnxmltools.convert import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = mlflow.xgboost.load_model(str(folder))
    if type(model).__name__ == "Booster":
        raise Refused("it is a bare xgboost.Booster; log the XGBClassifier or XGBRegressor that holds it")
    matrix = _matrix(example)
    # The converter knows columns by their place only.
    model.get_booster().feature_names = None
    made = convert_xgboost(model, initial_types=[(INPUT, FloatTensorType([None, matrix.shape[1]]))], target_opset=15)
    return _boosted(made, model, example, matrix)


def _lightgbm(folder: Path, example: Any) -> Converted:
    import mlflow.lightgbm
    from onnxmltools.convert import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    model = mlflow.lightgbm.load_model(str(folder))
    if type(model).__name__ == "Booster":
        raise Refused("it is a bare lightgbm.Booster; log the LGBMClassifier or LGBMRegressor that holds it")
    matrix = _matrix(example)
    made = convert_lightgbm(model, initial_types=[(INPUT, FloatTensorType([None, matrix.shape[1]]))], target_opset=15, zipmap=False)
    return _boosted(made, model, example, matrix)


def _pytorch(folder: Path, example: Any) -> Converted:
    import mlflow.pytorch
    import torch

    if hasattr(example, "columns"):
        raise Refused("its input example is a data frame; a network takes arrays: log the arrays that it was called with")
    exported = next(folder.glob("*/model.pt2"), None)
    program = torch.export.load(exported) if exported is not None else None
    model = program.module() if program is not None else mlflow.pytorch.load_model(str(folder), map_location="cpu").eval()
    given = {str(name): array for name, array in example.items()} if isinstance(example, Mapping) else {INPUT: example}
    inputs = {name: _single(np.asarray(array)[:MAX_ROWS]) for name, array in given.items()}
    tensors = tuple(torch.from_numpy(array) for array in inputs.values())
    with torch.no_grad():
        answers = _named(model(*tensors))
    names: Any = {"input_names": list(inputs), "output_names": list(answers), "opset_version": OPSET, "dynamo": True, "verbose": False}
    if program is not None:
        made = torch.onnx.export(program, **names)
    else:
        made = torch.onnx.export(model, tensors, dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors), **names)
    if made is None:
        raise Refused("the exporter of torch made nothing of it")
    proto = made.model_proto
    proto.ir_version = IR_VERSION
    if any(value.type.tensor_type.shape.dim[0].HasField("dim_value") for value in proto.graph.input):
        raise Refused("it was exported for one number of rows only; log it with an input example of at least two rows")
    return Converted(proto, inputs, {name: value.detach().numpy() for name, value in answers.items()})


def _single(array: Array) -> Array:
    """As torch has numbers by default, and in one piece."""
    return np.ascontiguousarray(array.astype(np.float32) if array.dtype == np.float64 else array)


# What they share


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _any_batch(converted: Converted) -> Converted:
    """Says of every output that it has as many rows as came in: some converters write what they saw."""
    for value in converted.model.graph.output:
        dims = value.type.tensor_type.shape.dim
        if not dims:
            dims.extend(onnx.TensorShapeProto.Dimension() for _ in converted.outputs[value.name].shape)
        dims[0].Clear()
        dims[0].dim_param = "batch"
    return converted


def _cast_before(made: onnx.ModelProto, inputs: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with its single-precision inputs taken in the types of `inputs`, and cast."""
    from onnx import helper

    graph = made.graph
    for value in graph.input:
        array = inputs.get(value.name)
        if array is None or array.dtype == np.float32:
            continue
        inner = f"{value.name}__single"
        for node in graph.node:
            node.input[:] = [inner if name == value.name else name for name in node.input]
        graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], to=onnx.TensorProto.FLOAT, name=f"cast_{value.name}"))
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    return _known(made)


def _known(made: onnx.ModelProto) -> onnx.ModelProto:
    """With the operators of ONNX itself among those that it imports: a converter of trees leaves them out."""
    if all(known.domain != "" for known in made.opset_import):
        made.opset_import.extend([onnx.helper.make_opsetid("", OPSET)])
    onnx.checker.check_model(made)
    return made


def _boosted(made: onnx.ModelProto, model: Any, example: Any, matrix: Array) -> Converted:
    """A converted booster, which takes one matrix; with a data frame as its example, one tensor for each column before it."""
    made.ir_version = IR_VERSION
    inputs: Mapping[str, Array] = {INPUT: matrix}
    if hasattr(example, "columns"):
        inputs = _tensors(example)
        made = _cast_before(_columns_before(made, list(inputs)), inputs)
    return _answered(made, inputs, model, example, hasattr(model, "predict_proba"))


def _columns_before(made: onnx.ModelProto, columns: Sequence[str]) -> onnx.ModelProto:
    """The model with one input of shape [-1, 1] per column, joined into the matrix that it takes."""
    from onnx import TensorProto, helper

    if INPUT in columns:
        raise Refused(f"a column named {INPUT!r} cannot be told from the matrix of all columns; rename it")
    graph = made.graph
    del graph.input[:]
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in columns)
    graph.node.insert(0, helper.make_node("Concat", list(columns), [INPUT], axis=1, name="columns"))
    return _known(made)


def _answered(made: onnx.ModelProto, inputs: Mapping[str, Array], model: Any, example: Any, classifies: bool) -> Converted:
    """What the original answers, by the names that the converter gave to its outputs; probabilities first: they are what is judged."""
    names = [output.name for output in made.graph.output]
    shown = example[:MAX_ROWS]
    if not classifies:
        return Converted(made, inputs, {names[0]: np.asarray(model.predict(shown), dtype=np.float32).reshape(len(shown), -1)})
    if len(names) != 2:
        raise Refused(f"the converter gave it the outputs {', '.join(names)}, and not a label and probabilities")
    label, probabilities = names
    labels = np.asarray(model.predict(shown))
    labels = labels.astype(np.int64) if labels.dtype.kind in "iub" else labels.astype(str)
    return Converted(made, inputs, {probabilities: np.asarray(model.predict_proba(shown), dtype=np.float32), label: labels})


def _know_boosters() -> None:
    """Lets pipelines of scikit-learn hold boosters, where they are installed."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import calculate_linear_classifier_output_shapes, calculate_linear_regressor_output_shapes

    try:
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
    except ImportError:
        pass
    else:
        options = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
        update_registered_converter(
            xgboost.XGBClassifier, "XGBoostXGBClassifier", calculate_linear_classifier_output_shapes, convert_xgboost, options=options
        )
        update_registered_converter(xgboost.XGBRegressor, "XGBoostXGBRegressor", calculate_linear_regressor_output_shapes, convert_xgboost)
    try:
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    except ImportError:
        pass
    else:
        options = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
        update_registered_converter(
            lightgbm.LGBMClassifier, "LightGbmLGBMClassifier", calculate_linear_classifier_output_shapes, convert_lightgbm, options=options
        )
        update_registered_converter(
            lightgbm.LGBMRegressor, "LightGbmLGBMRegressor", calculate_linear_regressor_output_shapes, convert_lightgbm
        )


def _example(logged: Any, folder: Path) -> Any:
    example = logged.load_input_example(str(folder))
    if example is None:
        raise Refused(
            "it was logged without an input example, so nothing could show that it still answers the same; log it with input_example="
        )
    if len(example) == 0:
        raise Refused("its input example has no rows")
    return example


def _tensors(example: Any) -> dict[str, Array]:
    """The example's rows as tensors: one of shape [-1, 1] for each column of a data frame, else one for the array."""
    if hasattr(example, "columns"):
        return {str(name): _column(str(name), example[name].to_numpy()[:MAX_ROWS]) for name in example.columns}
    return {INPUT: _matrix(example)}


def _column(name: str, values: Array) -> Array:
    if values.dtype.kind in "fiub":
        return values.reshape(-1, 1)
    if all(isinstance(value, str) for value in values):
        return values.astype(object).reshape(-1, 1)
    raise Refused(f"its column {name} holds {values.dtype}; what can be converted are numbers, truth values and texts without gaps")


def _matrix(example: Any) -> Array:
    array = np.asarray(example)[:MAX_ROWS]
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise Refused(f"its input example is {array.ndim}-dimensional {array.dtype}; rows of numbers are needed")
    return array.astype(np.float32)


def _skl_type(array: Array) -> Any:
    from skl2onnx.common import data_types as known

    made = {
        "float32": known.FloatTensorType,
        "float64": known.DoubleTensorType,
        "int64": known.Int64TensorType,
        "int32": known.Int32TensorType,
        "bool": known.BooleanTensorType,
        "object": known.StringTensorType,
    }.get(array.dtype.name)
    if made is None:
        raise Refused(f"its input example holds {array.dtype}, which has no counterpart; use float32, float64, int32, int64, bool or texts")
    return made([None, *array.shape[1:]])


def _named(answer: Any) -> Mapping[str, Any]:
    """What a network answers, by name. Raises Refused for what are no tensors."""
    if isinstance(answer, Mapping):
        named = {str(name): value for name, value in answer.items()}
    elif isinstance(answer, tuple | list):
        named = {f"output_{index}": value for index, value in enumerate(answer)}
    else:
        named = {"output": answer}
    for name, value in named.items():
        if not hasattr(value, "detach"):
            raise Refused(f"its answer {name} is {type(value).__name__}, and not a tensor")
    return named


def _datatype(array: Array) -> str:
    return _V2.get(array.dtype.name, "BYTES")


def _rows(name: str, array: Array) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(f"its input example makes {name} hold what is no number (NaN or infinity), which no request can say in JSON")
    return array.tolist()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
