"""Protobuf messages as JSON and as JSON schema, by one mapping, so that OpenAPI says what is answered.

It is the standard proto3 JSON mapping with the fields' own names, with every field present, and with one difference: 64-bit
integers are JSON numbers, since ours (versions, milliseconds, sizes) stay below 2^53.
"""

from __future__ import annotations

import base64
import math
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Json = dict[str, Any]

_SCALARS: dict[int, Json] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": "number"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer"},
    FieldDescriptor.CPPTYPE_INT64: {"type": "integer"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer"},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "integer"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
}


def to_json(message: Message) -> Json:
    """Every field by its own name; an absent message is null, bytes are base64, a timestamp RFC 3339 in UTC, an enum its name."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def schema(message_class: type[Message]) -> Json:
    """The JSON schema of what `to_json` makes of such a message."""
    return _schema(cast(Descriptor, message_class.DESCRIPTOR), ())


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if _is_map(field):
        inner = field.message_type.fields_by_name["value"]
        return {str(key): _value(item, inner) for key, item in sorted(value.items())}
    if field.is_repeated:
        return [_value(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: FieldDescriptor) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return value.ToJsonString() if isinstance(value, Timestamp) else to_json(value)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        named = field.enum_type.values_by_number.get(value)
        return named.name if named else value
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no number for these; proto3's mapping has these words
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _is_map(field: FieldDescriptor) -> bool:
    return field.is_repeated and field.message_type is not None and field.message_type.GetOptions().map_entry


def _schema(descriptor: Descriptor, above: tuple[str, ...]) -> Json:
    if descriptor.full_name == Timestamp.DESCRIPTOR.full_name:
        return {"type": "string", "format": "date-time"}
    if descriptor.full_name in above:  # recursive messages end here
        return {"type": "object"}
    here = (*above, descriptor.full_name)
    return {"type": "object", "properties": {field.name: _field_schema(field, here) for field in descriptor.fields}}


def _field_schema(field: FieldDescriptor, above: tuple[str, ...]) -> Json:
    if _is_map(field):
        return {"type": "object", "additionalProperties": _one_schema(field.message_type.fields_by_name["value"], above)}
    one = _one_schema(field, above)
    if field.is_repeated:
        return {"type": "array", "items": one}
    return {"anyOf": [one, {"type": "null"}]} if field.has_presence else one


def _one_schema(field: FieldDescriptor, above: tuple[str, ...]) -> Json:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return _schema(field.message_type, above)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.type == FieldDescriptor.TYPE_BYTES:
        return {"type": "string", "contentEncoding": "base64"}
    return dict(_SCALARS[field.cpp_type])
