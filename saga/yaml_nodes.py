"""Reads untrusted YAML into nodes with positions, noting every fault. What a map must hold is `yaml_fields.py`.

Shared by workflow definitions and the configuration. Built on the parser's events, not on a YAML loader: no object is
constructed, nothing is expanded, and reading stops at a depth of our own. (The C parser takes two minutes for 200,000
opening brackets; it never gets that far here.)

Plain scalars mean what YAML 1.1 and 1.2 agree on. Where the two read different things (`yes`, `1_000`, `010`, `1:30`,
`2024-01-01`) the value is refused with a word on what to write, instead of guessed at.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from typing import Any

import msgspec
import yaml

MAX_YAML_BYTES = 256 * 1024
"""Spec section 1."""

MAX_DEPTH = 64
"""Maps and lists within each other, the outermost one included. A workflow uses four, before its `input`s."""

MAX_FAULTS = 1000
"""More are not listed: nobody reads on, and a megabyte of messages would be an attack of its own."""

_PARSER: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""Only its events are used. The C one is in every wheel of PyYAML; the Python one does the same, far slower."""


# --- faults ----------------------------------------------------------------------------------------------------------


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong. `line` and `column` count from 1; `origin` names where a value came from when that is
    not the text (an environment variable)."""

    path: str
    reason: str
    message: str
    line: int | None = None
    column: int | None = None
    origin: str | None = None


class Faults:
    """All that is wrong with one text."""

    def __init__(self) -> None:
        self._listed: list[Fault] = []
        self._more = False

    def __bool__(self) -> bool:
        return bool(self._listed)

    @property
    def full(self) -> bool:
        """No more faults will be listed, so it is pointless to word them."""
        return len(self._listed) >= MAX_FAULTS

    def note(self, path: str, reason: str, message: str, at: Node | Mark | None = None) -> None:
        if self.full:
            self._more = True
            return
        mark = at if isinstance(at, Mark) else at.mark if at is not None else Mark(line=None, column=None)
        self._listed.append(
            Fault(path=path, reason=reason, message=message, line=mark.line, column=mark.column, origin=mark.origin)
        )

    def in_order(self) -> tuple[Fault, ...]:
        """In the order of the text; what has no position comes last."""

        def position(fault: Fault) -> tuple[int, int]:
            if fault.line is None:
                return (2**62, 0)
            return (fault.line, fault.column or 0)

        faults = sorted(self._listed, key=position)
        if self._more:
            faults.append(Fault(path="", reason="too_many", message=f"there are more than these {MAX_FAULTS} errors"))
        return tuple(faults)


# --- nodes -----------------------------------------------------------------------------------------------------------


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Where something stands."""

    line: int | None
    column: int | None
    origin: str | None = None


@dataclasses.dataclass(slots=True)
class Scalar:
    """`plain`: written without quotes, so its text may mean a number, a boolean or null.

    `source` is set where the text is not what was written (variables were expanded): it is shown instead of the text,
    which may be secret, and a string is then taken whatever the text looks like.
    """

    text: str
    plain: bool
    mark: Mark
    source: str | None = None


@dataclasses.dataclass(slots=True)
class Items:
    """A list."""

    items: list[Node]
    mark: Mark


@dataclasses.dataclass(slots=True)
class Fields:
    """A map; keys are strings, each there once."""

    fields: dict[str, tuple[Mark, Node]]
    mark: Mark


@dataclasses.dataclass(slots=True)
class Refused:
    """Something whose fault is noted already."""

    mark: Mark


Node = Scalar | Items | Fields | Refused


def read_nodes(text: str | bytes, faults: Faults, *, max_bytes: int = MAX_YAML_BYTES) -> Node | None:
    """The one document in `text`. None: there is none to be looked at further; a fault says why.

    Notes as faults: text that is too long or not UTF-8, characters YAML forbids, bad syntax, aliases, anchors, tags,
    duplicate keys, keys that are not strings, more than one document, and more than `MAX_DEPTH` levels.
    """
    decoded = _decode(text, faults, max_bytes)
    if decoded is None:
        return None
    parser = _PARSER(decoded)
    try:
        return _Composer(faults).compose(parser)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Mark(line=mark.line + 1, column=mark.column + 1) if mark is not None else None
        problem = error.problem or error.context or "it cannot be read"
        faults.note("", "syntax", f"not YAML: {problem}{_SYNTAX_HINTS.get(problem, '')}", at)
    # ValueError, OverflowError: the Python parser's answer to escapes beyond Unicode.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        faults.note("", "syntax", f"not YAML: {cut(str(error))}")
    finally:
        parser.dispose()
    return None


_SYNTAX_HINTS = {
    "mapping values are not allowed in this context": "; put a text that holds ': ' in quotes",
    "mapping values are not allowed here": "; put a text that holds ': ' in quotes",
    "found character that cannot start any token": "; indent with spaces; put a text that begins with @ or ` in quotes",
}
"""The two mistakes everybody makes with expressions in YAML, by what the parsers say."""


def _decode(text: str | bytes, faults: Faults, max_bytes: int) -> str | None:
    # A string of that many characters has at least as many bytes: no need to encode a huge one to refuse it.
    if len(text) > max_bytes or (isinstance(text, str) and len(text.encode("utf-8", "replace")) > max_bytes):
        faults.note("", "too_large", f"expected at most {max_bytes} bytes of YAML", Mark(line=1, column=1))
        return None
    if isinstance(text, bytes):
        raw = text
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            good = raw[: error.start].decode("utf-8")
            faults.note("", "encoding", f"expected UTF-8, got byte 0x{raw[error.start]:02x}", _mark_at(good, len(good)))
            return None
    text = text.removeprefix("\ufeff")
    forbidden = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if forbidden is not None:
        faults.note(
            "",
            "syntax",
            f"not YAML: character U+{ord(forbidden[0]):04X} is not allowed",
            _mark_at(text, forbidden.start()),
        )
        return None
    return text


def _mark_at(text: str, offset: int) -> Mark:
    before = text[:offset]
    return Mark(line=before.count("\n") + 1, column=len(before) - (before.rfind("\n") + 1) + 1)


@dataclasses.dataclass(slots=True)
class _Open:
    """A map or list whose end has not come yet. `key`: a map's key that waits for its value."""

    node: Fields | Items
    path: str
    key: str | None = None
    key_mark: Mark | None = None
    at_key: bool = True
    """The next child of a map is a key."""


class _Composer:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._open: list[_Open] = []
        self._root: Node | None = None

    def compose(self, parser: Any) -> Node | None:
        documents = 0
        while parser.check_event():
            event = parser.get_event()
            mark = Mark(line=event.start_mark.line + 1, column=event.start_mark.column + 1)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents == 2:
                    self._faults.note("", "documents", "expected one document, got a second one", mark)
                    return self._root
            elif isinstance(event, yaml.AliasEvent):
                self._note("alias", "aliases (*) are not allowed", mark)
                self._place(Refused(mark))
            elif isinstance(event, yaml.ScalarEvent):
                self._refuse_properties(event, mark)
                self._place(Scalar(text=event.value, plain=event.style in (None, ""), mark=mark))
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._refuse_properties(event, mark)
                if len(self._open) == MAX_DEPTH:
                    self._note("too_deep", f"nested too deeply, expected at most {MAX_DEPTH} levels", mark)
                    return None
                path = self._child_path()
                node = Fields({}, mark) if isinstance(event, yaml.MappingStartEvent) else Items([], mark)
                self._open.append(_Open(node, path))
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                self._place(self._open.pop().node)
        if self._root is None or (isinstance(self._root, Scalar) and self._root.plain and not self._root.text):
            self._faults.note("", "empty", "the text is empty", Mark(line=1, column=1))
            return None
        return self._root

    def _refuse_properties(self, event: Any, mark: Mark) -> None:
        if event.anchor is not None:
            self._note("anchor", "anchors (&) are not allowed", mark)
        if event.tag is not None:
            self._note("tag", "tags (!) are not allowed", mark)

    def _note(self, reason: str, message: str, mark: Mark) -> None:
        self._faults.note(self._child_path(), reason, message, mark)

    def _child_path(self) -> str:
        if not self._open:
            return ""
        parent = self._open[-1]
        if isinstance(parent.node, Items):
            return f"{parent.path}[{len(parent.node.items)}]"
        return parent.path if parent.key is None else join(parent.path, parent.key)

    def _place(self, node: Node) -> None:
        """Puts a finished node where it belongs: into the list or map that is open, or at the root."""
        if not self._open:
            self._root = node
            return
        parent = self._open[-1]
        if isinstance(parent.node, Items):
            parent.node.items.append(node)
        elif parent.at_key:
            parent.at_key = False
            parent.key, parent.key_mark = self._key(node, parent), node.mark
        else:
            # A key that was refused, or is there already, loses its value: its fault is noted.
            if parent.key is not None and parent.key_mark is not None and parent.key not in parent.node.fields:
                parent.node.fields[parent.key] = (parent.key_mark, node)
            parent.at_key, parent.key = True, None

    def _key(self, node: Node, parent: _Open) -> str | None:
        assert isinstance(parent.node, Fields)
        if isinstance(node, Refused):
            return None
        if not isinstance(node, Scalar) or kind_of(node) is not Kind.STRING:
            hint = "; merge keys are not allowed" if isinstance(node, Scalar) and node.text == "<<" else ""
            self._faults.note(parent.path, "key", f"expected a string as key, got {describe(node)}{hint}", node.mark)
            return None
        first = parent.node.fields.get(node.text)
        if first is not None:
            path = join(parent.path, node.text)
            self._faults.note(
                path, "duplicate_key", f"duplicate key, the first one is on line {first[0].line}", node.mark
            )
        return node.text


# --- what a scalar means ---------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    STRING = "string"
    INT = "int"
    FLOAT = "number"
    BOOL = "boolean"
    NULL = "null"
    AMBIGUOUS = "ambiguous"
    """YAML 1.1 and 1.2 disagree on it, or it has no finite value."""


_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_OTHER_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|0o[0-7]+")
"""Numbers to one version of YAML only (`08`, `0o17`), or too long to be one."""
_STRING_TAG = "tag:yaml.org,2002:str"
_RESOLVER = yaml.resolver.Resolver()


def kind_of(scalar: Scalar) -> Kind:
    """What a scalar is, strictly: a boolean is no int, and what is doubtful is `AMBIGUOUS`."""
    text = scalar.text
    if not scalar.plain:
        return Kind.STRING
    if text in _NULLS:
        return Kind.NULL
    if text in _BOOLS:
        return Kind.BOOL
    if _INT.fullmatch(text):
        return Kind.INT
    if len(text) <= 100 and not text.lstrip("+-").isdigit() and _FLOAT.fullmatch(text):
        return Kind.FLOAT if math.isfinite(float(text)) else Kind.AMBIGUOUS
    if _OTHER_NUMBER.fullmatch(text):
        return Kind.AMBIGUOUS
    return Kind.STRING if _yaml11_tag(text) == _STRING_TAG else Kind.AMBIGUOUS


def value_of(scalar: Scalar) -> str | int | float | bool | None:
    """The value of a scalar; an ambiguous one gives its text."""
    kind = kind_of(scalar)
    if kind is Kind.NULL:
        return None
    if kind is Kind.BOOL:
        return _BOOLS[scalar.text]
    if kind is Kind.INT:
        return int(scalar.text)
    if kind is Kind.FLOAT:
        return float(scalar.text)
    return scalar.text


def _yaml11_tag(text: str) -> str:
    return str(_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]  # its stubs


def describe(node: Node) -> str:
    """What a node is, for a message: `the string 'x'`, `3`, `a list`. Never shows what came from the environment."""
    if isinstance(node, Items):
        return "a list"
    if isinstance(node, Fields):
        return "a map"
    if isinstance(node, Refused):
        return "something that is not allowed"
    if node.source is not None:
        return cut(node.source, 60)
    kind = kind_of(node)
    shown = cut(node.text, 60)
    if kind is Kind.STRING:
        return f"the string {shown!r}"
    if kind is Kind.NULL:
        return "null"
    if kind is Kind.AMBIGUOUS:
        return f"{shown}, {_doubt(node.text)}"
    return shown


def describe_kind(node: Node) -> str:
    """As `describe`, without the text of a string."""
    return "a string" if isinstance(node, Scalar) and kind_of(node) is Kind.STRING else describe(node)


def _doubt(text: str) -> str:
    """What speaks against an ambiguous scalar."""
    tag = _yaml11_tag(text)
    if tag == "tag:yaml.org,2002:bool":
        return "a boolean to some YAML readers and a string to others"
    if tag == "tag:yaml.org,2002:timestamp":
        return "a date to some YAML readers and a string to others"
    if text.lstrip("+-").lower() in (".inf", ".nan") or _FLOAT.fullmatch(text):
        return "which is not finite or too large"
    if tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") or _OTHER_NUMBER.fullmatch(text):
        return "which is not a plain decimal number"
    return "which has a meaning of its own in YAML"


def join(path: str, key: str) -> str:
    """The path of a key: `retry.max_attempts`, `input."a b"`. Long keys are cut."""
    key = cut(key, 60)
    if not re.fullmatch(r"[\w-]+", key):
        key = json.dumps(key, ensure_ascii=False)
    return f"{path}.{key}" if path else key


def cut(text: str, limit: int = 200) -> str:
    """At most `limit` characters, on one line."""
    text = text[: limit + 1].replace("\n", " ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
