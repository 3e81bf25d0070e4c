"""Arbitrary messages of any type, field by field from its descriptor: what a client could send, sane or not."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

AnyMessage = TypeVar("AnyMessage", bound=Message)

_TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "active", "\x00", "é", "2019", "2019-13", "2019-02-30", "../x", "a" * 70_000, "ab" * 300]
    ),
)
_REAL = st.floats(allow_nan=True, allow_infinity=True)
_BY_TYPE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(st.integers(-2, 3), st.integers(-(1 << 63), (1 << 63) - 1)),
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(st.integers(0, 30), st.integers(0, (1 << 32) - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.one_of(st.sampled_from([0.0, 1e-3]), _REAL),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    # Enums are open: a number that this version does not know arrives as it is.
    FieldDescriptor.CPPTYPE_ENUM: st.one_of(st.integers(0, 4), st.integers(-(1 << 31), (1 << 31) - 1)),
}


@st.composite
def messages(draw: st.DrawFn, kind: type[AnyMessage]) -> AnyMessage:
    """A message of the type `kind` with some of its fields set to anything that goes over the wire."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.is_repeated:
            values = draw(st.lists(_value(field), max_size=3))
            times = draw(st.sampled_from([1, 1, 1, 40, 500]))
            # Either many values or long ones; both together would only fill the memory of the tests.
            getattr(message, field.name).extend(values * (times if _is_short(values) else 1))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(_value(field)))
        else:
            setattr(message, field.name, draw(_value(field)))
    return message


def _value(field: Any) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(GetMessageClass(field.message_type))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return st.binary(max_size=20) if field.type == FieldDescriptor.TYPE_BYTES else _TEXT
    return _BY_TYPE[field.cpp_type]


def _is_short(values: list[Any]) -> bool:
    return sum(value.ByteSize() if isinstance(value, Message) else len(str(value)) for value in values) < 1000
