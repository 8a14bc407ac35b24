"""Filters and places of searches as SQL. Every value is a bound parameter; nothing that a caller wrote becomes part of a statement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracker.domain.filters import And, Comparison, Filter, Kind, Not, Op, Or
from tracker.domain.search import Place

TEXT, NUMBER, WHOLE = "text", "double precision", "bigint"

PREFIX = 'left({}.value, 100) COLLATE "C"'
"""What the indexes of params and tags hold of a value."""


@dataclass(slots=True)
class Binds:
    """The parameters of one statement. Names count up, so that statements of the same shape are the same text and are prepared once."""

    values: dict[str, Any] = field(default_factory=dict)

    def add(self, value: Any, cast: str) -> str:
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"CAST(:{name} AS {cast})"


@dataclass(frozen=True, slots=True)
class Column:
    """An expression to compare or to order by. `missing` is SQL that says when it has no value, "" when it always has one."""

    expression: str
    cast: str
    missing: str = ""


class Conditions:
    """Makes SQL of comparisons. `columns` are attributes, `tables` the tables of key and value by kind, whose rows `own` are those of the
    thing that is searched when `of` holds. `indexed`: the tables have indexes with the beginning of a text."""

    def __init__(self, binds: Binds, columns: Mapping[str, Column], tables: Mapping[Kind, str], of: str, *, indexed: bool) -> None:
        self._binds = binds
        self._columns = columns
        self._tables = tables
        self._of = of
        self._indexed = indexed

    def sql(self, condition: Filter) -> str:
        """True or false for every row, never NULL, so that NOT means the others."""
        match condition:
            case Comparison():
                return self._comparison(condition)
            case Not(part):
                return f"(NOT {self.sql(part)})"
            case And(parts):
                return "(" + " AND ".join(self.sql(part) for part in parts) + ")" if parts else "TRUE"
            case Or(parts):
                return "(" + " OR ".join(self.sql(part) for part in parts) + ")"

    def value(self, row: str, one: Comparison) -> str:
        """The comparison of the value in a row of one of the tables of keys and values."""
        column = Column(f"{row}.value", NUMBER if one.kind is Kind.METRIC else TEXT)
        same = compared(self._binds, column, one.op, one.value)
        if self._indexed and one.op is Op.EQ and one.kind is not Kind.METRIC:
            # What the index holds; the whole value as well, since it may be longer.
            return f"{PREFIX.format(row)} = left({self._binds.add(one.value, TEXT)}, 100) AND {same}"
        return same

    def _comparison(self, one: Comparison) -> str:
        if one.kind is Kind.ATTRIBUTE:
            column = self._columns[one.key]
            told = compared(self._binds, column, one.op, one.value)
            return f"(NOT ({column.missing}) AND {told})" if column.missing else told
        if one.kind is Kind.DATASET:
            what = "tags ->> 'mlflow.data.context'" if one.key == "context" else one.key
            told = compared(self._binds, Column(f"(own.{what})", TEXT), one.op, one.value)
            return f"EXISTS (SELECT 1 FROM tracker.run_dataset AS own WHERE {self._of} AND {told})"  # noqa: S608 - values are bound
        key = self._binds.add(one.key, TEXT)
        row = f"SELECT 1 FROM {self._tables[one.kind]} AS own WHERE {self._of} AND own.key = {key}"  # noqa: S608 - values are bound
        if one.op is Op.IS_NULL:
            return f"NOT EXISTS ({row})"
        if one.op is Op.IS_NOT_NULL:
            return f"EXISTS ({row})"
        return f"EXISTS ({row} AND {self.value('own', one)})"


def compared(binds: Binds, column: Column, op: Op, value: Any) -> str:
    """One comparison of an expression that has a value."""
    left = column.expression
    match op:
        case Op.LIKE | Op.ILIKE:
            # No escape character: % and _ always stand for others.
            return f"{left} {op} {binds.add(value, TEXT)} ESCAPE ''"
        case Op.IN:
            return f"{left} = ANY ({binds.add(list(value), f'{TEXT}[]')})"
        case Op.NOT_IN:
            return f"{left} <> ALL ({binds.add(list(value), f'{TEXT}[]')})"
    if column.cast == WHOLE and isinstance(value, float):
        return f"CAST({left} AS {NUMBER}) {_SQL[op]} {binds.add(value, NUMBER)}"
    told = f"{left} {_SQL[op]} {binds.add(value, column.cast)}"
    # To PostgreSQL NaN is the largest number; to MLflow it is different from all and otherwise nothing.
    return f"({told} AND {left} < 'NaN')" if column.cast == NUMBER and op in (Op.GT, Op.GE) else told


_SQL = {Op.EQ: "=", Op.NE: "<>", Op.LT: "<", Op.LE: "<=", Op.GT: ">", Op.GE: ">="}


@dataclass(frozen=True, slots=True)
class Key:
    """One of the expressions by which a search is ordered; `order` is what it sorts by in place of the expression, for an index."""

    expression: str
    cast: str
    ascending: bool
    nullable: bool = False
    order: str = ""

    def sorted_by(self, expression: str, order: str = "") -> str:
        """Its part of ORDER BY, when it stands under this expression: missing values last, NaN before them."""
        direction = "ASC" if self.ascending else "DESC"
        parts = [f"({expression}) IS NULL"] if self.nullable else []
        if self.nullable and self.cast == NUMBER:
            parts.append(f"({expression}) = 'NaN'")
        if order:
            parts.append(f"{order} {direction}")
        return ", ".join([*parts, f"{expression} {direction}"])


def after(binds: Binds, keys: Sequence[Key], place: Place) -> str:
    """Whether a row stands after a place in the order of these keys."""
    told = "FALSE"
    for key, value in reversed(list(zip(keys, place, strict=True))):
        told = f"({_beyond(binds, key, value)} OR ({_level(binds, key, value)} AND {told}))"
    return told


def _beyond(binds: Binds, key: Key, value: Any) -> str:
    if value is None:
        return "FALSE"
    is_nan = isinstance(value, float) and math.isnan(value)
    last = [f"({key.expression}) IS NULL"] if key.nullable else []
    if is_nan:
        return " OR ".join(last) or "FALSE"
    if key.cast == NUMBER:
        last.append(f"{key.expression} = 'NaN'")
    sign = ">" if key.ascending else "<"
    return "(" + " OR ".join([*last, f"{key.expression} {sign} {binds.add(value, key.cast)}"]) + ")"


def _level(binds: Binds, key: Key, value: Any) -> str:
    if value is None:
        return f"({key.expression}) IS NULL"
    # NaN equals NaN in PostgreSQL.
    return f"{key.expression} = {binds.add(value, key.cast)}"
