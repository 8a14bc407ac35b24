"""ONNX files that name other files are found out, wherever in the model the tensor is, and without reading the tensors."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from artifacts import onnxfile, onnxwire
from artifacts.onnxfile import check_one_file
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from servicekit.errors import Invalid, TooLarge

WEIGHTS = np.ones((64, 64), np.float32)


def tensor(name: str = "w", external: bool = False) -> Any:
    made = numpy_helper.from_array(WEIGHTS, name)
    if external:
        onnx.external_data_helper.set_external_data(made, location="/etc/passwd")
        made.ClearField("raw_data")
    return made


def model(initializers: list[Any], nodes: list[Any] | None = None, **parts: Any) -> Any:
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 64])],
        initializers,
    )
    return helper.make_model(graph, **parts)


def written(folder: Path, made: Any) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


def constant(external: bool) -> Any:
    return helper.make_node("Constant", [], ["c"], value=tensor("c", external))


def branch(external: bool) -> Any:
    """A condition whose branch holds the tensor: a graph within a node within a graph."""
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [64, 64])], [tensor("c", external)])
    return helper.make_node("If", ["b"], ["z"], then_branch=inner, else_branch=inner)


def sparse(external: bool) -> Any:
    indices = numpy_helper.from_array(np.arange(64 * 64), "i")
    return helper.make_sparse_tensor(tensor("c", external), indices, [64 * 64])


def function(external: bool) -> Any:
    return helper.make_function("d", "F", ["x"], ["c"], [constant(external)], [helper.make_opsetid("", 20)])


PLACES: dict[str, Any] = {
    "initializer": lambda external: model([tensor("a"), tensor("c", external), tensor("b")]),
    "constant": lambda external: model([tensor()], [constant(external)]),
    "list of tensors": lambda external: model([], [helper.make_node("N", [], ["c"], domain="d", ts=[tensor("a"), tensor("c", external)])]),
    "branch": lambda external: model([tensor()], [branch(external)]),
    "function": lambda external: model([tensor()], functions=[function(external)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_it_is(place: str, tmp_path: Path) -> None:
    check_one_file(written(tmp_path, PLACES[place](False)))
    with pytest.raises(Invalid, match=r"keeps the tensor 'c' in another file \(external data\)"):
        check_one_file(written(tmp_path, PLACES[place](True)))


def test_external_data_is_found_in_a_sparse_tensor(tmp_path: Path) -> None:
    for external in (False, True):
        made = model([tensor()])
        made.graph.sparse_initializer.append(sparse(external))
        path = written(tmp_path, made)
        if external:
            with pytest.raises(Invalid, match="external data"):
                check_one_file(path)
        else:
            check_one_file(path)


def test_a_model_that_the_onnx_package_has_saved_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(model([tensor()]), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= WEIGHTS.nbytes
    with pytest.raises(Invalid, match="'w' in another file"):
        check_one_file(path)


def test_either_sign_of_external_data_is_enough(tmp_path: Path) -> None:
    only_place = tensor()
    only_place.external_data.add(key="location", value="x")
    only_flag = tensor()
    only_flag.data_location = TensorProto.EXTERNAL
    taken_back = only_flag.SerializeToString() + bytes([onnxfile.DATA_LOCATION << 3, 0])
    assert TensorProto.FromString(taken_back).data_location == TensorProto.DEFAULT
    # The same number in more bits than an enum has.
    wide = tensor().SerializeToString() + bytes([onnxfile.DATA_LOCATION << 3, 0x81, 0x80, 0x80, 0x80, 0x10])
    assert TensorProto.FromString(wide).data_location == TensorProto.EXTERNAL
    for one in (only_place.SerializeToString(), only_flag.SerializeToString(), taken_back, wide):
        graph = _field(5, one)
        with pytest.raises(Invalid, match="external data"):
            check_one_file(written(tmp_path, _field(7, graph)))


def test_a_large_forest_is_skimmed(tmp_path: Path) -> None:
    values = list(range(-1000, 200_000))
    node = helper.make_node("T", ["x"], ["y"], domain="d", floats=[float(v) for v in values], ints=values, after=tensor("c", True))
    with pytest.raises(Invalid, match="'c' in another file"):
        check_one_file(written(tmp_path, model([], [node])))


def test_the_numbers_are_those_of_onnx() -> None:
    """Every message from which a tensor can be reached is in the table, by every field that leads there."""
    messages = {
        one.DESCRIPTOR.name: one.DESCRIPTOR for one in vars(onnx).values() if hasattr(one, "DESCRIPTOR") and hasattr(one, "FromString")
    }
    reaching = {onnxfile.TENSOR}
    for _ in messages:
        reaching |= {
            name for name, message in messages.items() if any(f.message_type and f.message_type.name in reaching for f in message.fields)
        }
    found: dict[str, dict[int, str]] = {}
    wanted = ["ModelProto"]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = {
                f.number: f.message_type.name for f in messages[name].fields if f.message_type and f.message_type.name in reaching
            }
            wanted += found[name].values()
    assert found == onnxfile.INNER
    by_name = TensorProto.DESCRIPTOR.fields_by_name
    assert [by_name[name].number for name in ("name", "external_data", "data_location")] == [
        onnxfile.NAME,
        onnxfile.EXTERNAL_DATA,
        onnxfile.DATA_LOCATION,
    ]
    attribute = onnx.AttributeProto.DESCRIPTOR.fields_by_name
    assert (attribute["floats"].number << 3 | 5, attribute["ints"].number << 3) == (0x3D, 0x40)


def _field(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 0x7F:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"not a model",
        b"\x3a\x05ab",  # longer than what there is
        b"\x3a\x02\x3d\x00",  # a number cut off
        b"\x08" + b"\xff" * 11,
        b"\x0b\x0c",  # a group
        b"\x00\x01",
        b"\x08",
    ],
)
def test_what_is_no_protobuf_is_refused(wrong: bytes, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no ONNX model"):
        check_one_file(written(tmp_path, wrong))


def test_depth_and_size_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = b""
    for _ in range(40):  # each is three messages deeper
        graph = _field(1, _field(5, _field(6, graph)))
    with pytest.raises(Invalid, match="no ONNX model"):
        check_one_file(written(tmp_path, _field(7, graph)))
    monkeypatch.setattr(onnxwire, "MAX_FIELDS", 10)
    with pytest.raises(TooLarge, match="more than 10 parts"):
        check_one_file(written(tmp_path, b"\x08\x08" * 11))
    monkeypatch.setattr(onnxfile, "MAX_ONNX_BYTES", 20)
    with pytest.raises(TooLarge, match="at most 20 bytes"):
        check_one_file(written(tmp_path, b"\x08\x08" * 11))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = written(tmp_path_factory.mktemp("any"), data)
    with contextlib.suppress(Invalid):  # the one error that there may be
        check_one_file(path)


def names_files(message: Any) -> bool:
    """Whether protobuf's own reader sees a tensor with external data."""
    if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
        return True
    inner = [value for field, value in message.ListFields() if field.message_type]
    each = (one for value in inner for one in ([value] if hasattr(value, "ListFields") else value))
    return any(names_files(one) for one in each)


SMALL = model([], [branch(True)], functions=[function(True)]).SerializeToString()


@settings(max_examples=300)
@given(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=3))
def test_nothing_that_protobuf_reads_as_external_gets_through(tmp_path_factory: pytest.TempPathFactory, at: int, new: bytes) -> None:
    data = SMALL[:at] + new + SMALL[at + len(new) :]
    try:
        seen = names_files(onnx.ModelProto.FromString(data))
    except DecodeError:
        return
    path = written(tmp_path_factory.mktemp("changed"), data)
    if seen:
        with pytest.raises(Invalid):
            check_one_file(path)
