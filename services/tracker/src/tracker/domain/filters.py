"""Filters and orderings of MLflow's searches, read into small trees, and the words that runs and experiments are searched by.

The language is that of MLflow 3.17 (https://mlflow.org/docs/latest/search-runs): comparisons joined by AND. OR, NOT and parentheses are an
extension that a caller has to ask for. A text is bounded in length, in comparisons and in depth before it is parsed or while it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken, VisitError

from tracker.domain.errors import Problem, Rejected

MAX_LENGTH = 200_000
"""Characters of a filter: a page may ask for thousands of runs by their ids."""

MAX_COMPARISONS = 100
MAX_DEPTH = 32
"""Parentheses within parentheses, and NOTs before them."""

MAX_LISTED = 5_000
"""Values in one IN (..)."""

MAX_ORDER_BY = 10


class Kind(StrEnum):
    """What a comparison looks at, in the words of MLflow's errors."""

    METRIC = "metric"
    PARAM = "parameter"
    TAG = "tag"
    ATTRIBUTE = "attribute"
    DATASET = "dataset"


class Op(StrEnum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    LIKE = "LIKE"
    ILIKE = "ILIKE"
    IN = "IN"
    NOT_IN = "NOT IN"
    IS_NULL = "IS NULL"
    IS_NOT_NULL = "IS NOT NULL"


Value = str | float | int | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison. `value` is a text, a number for what is numeric, a tuple for IN and NOT IN, None for IS NULL and IS NOT NULL."""

    kind: Kind
    key: str
    op: Op
    value: Value


@dataclass(frozen=True, slots=True)
class And:
    """All hold; with no parts it always holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: Filter


Filter = Comparison | And | Or | Not

EVERYTHING = And(())


@dataclass(frozen=True, slots=True)
class OrderBy:
    kind: Kind
    key: str
    ascending: bool


_EQUAL = frozenset({Op.EQ, Op.NE})
_PATTERNS = _EQUAL | {Op.LIKE, Op.ILIKE}
_LISTS = frozenset({Op.IN, Op.NOT_IN})
_NULLS = frozenset({Op.IS_NULL, Op.IS_NOT_NULL})
NUMERIC = _EQUAL | {Op.LT, Op.LE, Op.GT, Op.GE}


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute by the name that it has here, and how it may be compared."""

    name: str
    ops: frozenset[Op]

    @property
    def numeric(self) -> bool:
        return Op.LT in self.ops


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What can be searched in one kind of thing: spellings of kinds, how each kind may be compared, attributes by all their spellings."""

    kinds: Mapping[str, Kind]
    ops: Mapping[Kind, frozenset[Op]]
    attributes: Mapping[str, Attribute]
    ordered: frozenset[Kind]


_TEXT = Attribute("", _PATTERNS)
_TIME = Attribute("", NUMERIC)


def _named(attribute: Attribute, name: str, *spellings: str) -> dict[str, Attribute]:
    return dict.fromkeys((name, *spellings), Attribute(name, attribute.ops))


RUNS = Vocabulary(
    kinds={
        **dict.fromkeys(("metric", "metrics"), Kind.METRIC),
        **dict.fromkeys(("parameter", "parameters", "param", "params"), Kind.PARAM),
        **dict.fromkeys(("tag", "tags"), Kind.TAG),
        **dict.fromkeys(("attribute", "attributes", "attr", "run"), Kind.ATTRIBUTE),
        **dict.fromkeys(("dataset", "datasets"), Kind.DATASET),
    },
    ops={Kind.METRIC: NUMERIC, Kind.PARAM: _PATTERNS | _NULLS, Kind.TAG: _PATTERNS | _NULLS, Kind.DATASET: _PATTERNS | _LISTS},
    attributes={
        **_named(Attribute("", _PATTERNS | _LISTS), "run_id"),
        **_named(_TEXT, "run_name", "run name", "Run name", "Run Name"),
        **_named(_TEXT, "user_id"),
        **_named(_TEXT, "status"),
        **_named(_TEXT, "artifact_uri"),
        **_named(_TIME, "start_time", "created", "Created"),
        **_named(_TIME, "end_time"),
    },
    ordered=frozenset({Kind.METRIC, Kind.PARAM, Kind.TAG, Kind.ATTRIBUTE}),
)

EXPERIMENTS = Vocabulary(
    kinds={**dict.fromkeys(("tag", "tags"), Kind.TAG), **dict.fromkeys(("attribute", "attributes"), Kind.ATTRIBUTE)},
    ops={Kind.TAG: _PATTERNS | _NULLS},
    attributes={
        **_named(_TEXT, "name"),
        **_named(Attribute("", _EQUAL | _LISTS), "experiment_id"),
        **_named(_TIME, "creation_time"),
        **_named(_TIME, "last_update_time"),
    },
    ordered=frozenset({Kind.ATTRIBUTE}),
)

DATASET_KEYS = ("name", "digest", "context")

# A part of a name stands bare or in any of the quotes. Keywords go before names, so that `x IS NULL` is not three names.
_GRAMMAR = r"""
plain: (comparison (_AND comparison)*)?
extended: disjunction?
?disjunction: conjunction (_OR conjunction)*
?conjunction: negation (_AND negation)*
?negation: _NOT negation -> negated
         | "(" disjunction ")"
         | comparison
comparison: NAME OP NUMBER                 -> numeric
          | NAME OP STRING                 -> textual
          | NAME (LIKE | ILIKE) STRING     -> textual
          | NAME _IN values                 -> listed
          | NAME _NOT _IN values            -> unlisted
          | NAME _IS _NULL                 -> missing
          | NAME _IS _NOT _NULL            -> present
values: "(" STRING ("," STRING)* ","? ")"
ordering: NAME (ASC | DESC)?

_AND.3: /and(?![\w.])/i
_OR.3: /or(?![\w.])/i
_NOT.3: /not(?![\w.])/i
_IN.3: /in(?![\w.])/i
_IS.3: /is(?![\w.])/i
_NULL.3: /null(?![\w.])/i
LIKE.3: /like(?![\w.])/i
ILIKE.3: /ilike(?![\w.])/i
ASC.3: /asc(?![\w.])/i
DESC.3: /desc(?![\w.])/i
OP: /[<>=!]+/
NUMBER.2: /[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?(?![\w.])/i
STRING.2: /'([^']|'')*'|"([^"]|"")*"/
NAME: /([^\W\d]\w*|`[^`]+`|"[^"]+")(\.(\w+|`[^`]+`|"[^"]+"|'[^']+'))*/
%ignore /\s+/
"""


class _Tree(Transformer[Token, Any]):
    """Makes comparisons from what was parsed, and holds each to the vocabulary."""

    def __init__(self, words: Vocabulary) -> None:
        super().__init__()
        self._words = words
        self._count = 0

    def numeric(self, given: list[Token]) -> Comparison:
        return self._compared(given[0], given[1], given[2])

    def textual(self, given: list[Token]) -> Comparison:
        return self._compared(given[0], given[1], given[2])

    def listed(self, given: list[Any]) -> Comparison:
        return self._made(given[0], Op.IN, given[1])

    def unlisted(self, given: list[Any]) -> Comparison:
        return self._made(given[0], Op.NOT_IN, given[1])

    def missing(self, given: list[Token]) -> Comparison:
        return self._made(given[0], Op.IS_NULL, None)

    def present(self, given: list[Token]) -> Comparison:
        return self._made(given[0], Op.IS_NOT_NULL, None)

    def values(self, given: list[Token]) -> tuple[str, ...]:
        if len(given) > MAX_LISTED:
            raise _wrong(f"a list in a filter has at most {MAX_LISTED} values, this one has {len(given)}")
        return tuple(_unquoted(token) for token in given)

    def negated(self, given: list[Filter]) -> Filter:
        return Not(given[0])

    def conjunction(self, given: list[Filter]) -> Filter:
        return And(tuple(given))

    def disjunction(self, given: list[Filter]) -> Filter:
        return Or(tuple(given))

    def plain(self, given: list[Filter]) -> Filter:
        return given[0] if len(given) == 1 else And(tuple(given))

    def extended(self, given: list[Filter]) -> Filter:
        return given[0] if given else EVERYTHING

    def ordering(self, given: list[Token]) -> OrderBy:
        kind, key = self._named(given[0])
        if kind not in self._words.ordered:
            raise _wrong(f"Invalid order_by entity '{kind}': nothing is ordered by it")
        ascending = len(given) == 1 or given[1].type == "ASC"
        return OrderBy(kind, self._words.attributes[key].name if kind is Kind.ATTRIBUTE else key, ascending)

    def _compared(self, name: Token, op: Token, value: Token) -> Comparison:
        spelled = str(op).upper()
        if spelled not in set(Op):
            raise _wrong(f"Invalid comparator '{op[:20]}': one of {', '.join(sorted(Op))} is needed")
        return self._made(name, Op(spelled), value)

    def _made(self, name: Token, op: Op, value: Token | tuple[str, ...] | None) -> Comparison:
        self._count += 1
        if self._count > MAX_COMPARISONS:
            raise _wrong(f"a filter has at most {MAX_COMPARISONS} comparisons")
        kind, key = self._named(name)
        if kind is Kind.ATTRIBUTE:
            attribute = self._words.attributes[key]
            allowed, numeric, key = attribute.ops, attribute.numeric, attribute.name
        else:
            allowed, numeric = self._words.ops[kind], kind is Kind.METRIC
        if op not in allowed:
            raise _wrong(f"Invalid comparator '{op}' for {kind} '{key[:100]}': one of {', '.join(sorted(allowed))} is needed")
        return Comparison(kind, key, op, _valued(kind, key, value, numeric))

    def _named(self, name: Token) -> tuple[Kind, str]:
        """Kind and key of a name; of an attribute the key as it was spelled."""
        first, dot, rest = _split(str(name))
        if dot:
            kind = self._words.kinds.get(_bare(first))
            if kind is None:
                raise _wrong(f"Invalid entity type '{first[:100]}'. Valid values are {', '.join(sorted(self._words.kinds))}")
            key = _bare(rest)
        else:
            kind, key = Kind.ATTRIBUTE, _bare(first)
        if kind is Kind.ATTRIBUTE and key not in self._words.attributes:
            valid = ", ".join(sorted(self._words.attributes))
            raise _wrong(f"Invalid attribute key '{key[:100]}' specified. Valid keys are {valid}")
        if kind is Kind.DATASET and key not in DATASET_KEYS:
            raise _wrong(f"Invalid dataset key '{key[:100]}' specified. Valid keys are {', '.join(DATASET_KEYS)}")
        return kind, key


@cache
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", lexer="contextual", start=["plain", "extended", "ordering"], maybe_placeholders=False)


def parse_filter(text: str, words: Vocabulary, *, extended: bool = False) -> Filter:
    """A filter as a tree; an empty one is EVERYTHING. `extended` allows OR, NOT and parentheses. Raises Rejected."""
    if len(text) > MAX_LENGTH:
        raise _wrong(f"a filter has at most {MAX_LENGTH} characters, this one has {len(text)}")
    if "\x00" in text:
        raise _wrong("a filter must not hold the character 0")
    if extended:
        _check_depth(text)
    found: Filter = _parsed(text, "extended" if extended else "plain", words)
    return found


def parse_order_by(clauses: Sequence[str], words: Vocabulary) -> tuple[OrderBy, ...]:
    """An ordering, its most important key first. Raises Rejected, also for a key that is there twice."""
    if len(clauses) > MAX_ORDER_BY:
        raise _wrong(f"order_by has at most {MAX_ORDER_BY} fields, these are {len(clauses)}", "order_by")
    found: list[OrderBy] = []
    for clause in clauses:
        if len(clause) > MAX_LENGTH or "\x00" in clause:
            raise _wrong("Invalid order_by clause: it is too long or holds the character 0", "order_by")
        one: OrderBy = _parsed(clause, "ordering", words)
        if any((one.kind, one.key) == (other.kind, other.key) for other in found):
            raise _wrong(f"`order_by` contains duplicate fields: {clause[:200]}", "order_by")
        found.append(one)
    return tuple(found)


def comparisons(condition: Filter) -> Iterator[Comparison]:
    """Every comparison in a filter."""
    match condition:
        case Comparison():
            yield condition
        case Not(part):
            yield from comparisons(part)
        case And(parts) | Or(parts):
            for part in parts:
                yield from comparisons(part)


def _parsed(text: str, start: str, words: Vocabulary) -> Any:
    field = "order_by" if start == "ordering" else "filter"
    try:
        return _Tree(words).transform(_parser().parse(text, start=start))
    except VisitError as error:
        if isinstance(error.orig_exc, Rejected):
            raise Rejected(Problem(field, problem.message) for problem in error.orig_exc.problems) from None
        raise
    except UnexpectedInput as error:
        raise _wrong(_unexpected(text, error, start), field) from None


def _unexpected(text: str, error: UnexpectedInput, start: str) -> str:
    if start == "ordering":
        return f"Invalid order_by clause '{text[:200]}'. Could not be parsed."
    if isinstance(error, UnexpectedEOF) or (isinstance(error, UnexpectedToken) and error.token.type == "$END"):
        return f"Invalid filter string: it ends in the middle of a comparison: '{text[-100:]}'"
    if isinstance(error, UnexpectedCharacters):
        return f"Invalid clause(s) in filter string: '{text[error.pos_in_stream or 0 :][:100]}'"
    token = error.token if isinstance(error, UnexpectedToken) else ""
    if start == "plain" and getattr(token, "type", "") in ("_OR", "_NOT", "LPAR"):
        return f"Invalid clause(s) in filter string: '{token}': OR, NOT and parentheses are an extension that must be asked for"
    return f"Invalid clause(s) in filter string: '{str(token)[:100]}'"


_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_NESTING = re.compile(r"[()]|\bnot\b", re.IGNORECASE)


def _check_depth(text: str) -> None:
    """Looks at parentheses and NOTs alone, before anything is parsed: what nests nothing else is a flat list."""
    depth = pending = 0
    for found in _NESTING.finditer(_QUOTED.sub(lambda quoted: " " * len(quoted[0]), text)):
        if found[0] == "(":
            depth += 1
        elif found[0] == ")":
            depth, pending = depth - 1, 0
        else:
            pending += 1
        if depth > MAX_DEPTH or pending > MAX_COMPARISONS + MAX_DEPTH:
            raise _wrong(f"a filter is nested at most {MAX_DEPTH} deep")


def _split(name: str) -> tuple[str, str, str]:
    """A name at its first dot outside of quotes."""
    if name[0] in '`"':
        end = name.index(name[0], 1) + 1
        return name[:end], name[end : end + 1], name[end + 1 :]
    return name.partition(".")


def _bare(part: str) -> str:
    return part[1:-1] if len(part) >= 2 and part[0] == part[-1] and part[0] in "`\"'" else part


def _unquoted(token: Token) -> str:
    quote = token[0]
    return token[1:-1].replace(quote * 2, quote)


def _valued(kind: Kind, key: str, value: Token | tuple[str, ...] | None, numeric: bool) -> Value:
    if value is None or isinstance(value, tuple):
        return value
    if numeric:
        if value.type != "NUMBER":
            raise _wrong(f"Expected numeric value type for {kind} '{key[:100]}'. Found {value[:100]}")
        return float(value) if kind is Kind.METRIC else _whole(value)
    if value.type != "STRING":
        raise _wrong(f"Expected a quoted string value for {kind} '{key[:100]}' (e.g. 'my-value'). Got value {value[:100]}")
    return _unquoted(value)


def _whole(value: str) -> int | float:
    """A number without a loss: an integer of 64 bits as such, all else as the nearest float."""
    if value.lstrip("+-").isdigit() and len(value) < 40 and -(2**63) <= int(value) < 2**63:
        return int(value)
    return float(value)


def _wrong(message: str, field: str = "filter") -> Rejected:
    return Rejected([Problem(field, message)])
