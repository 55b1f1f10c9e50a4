"""What must never be in a log line, whoever wrote the line: configured secrets, tokens, passwords in URLs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote, unquote

import msgspec

from saga.payload_mask import NOTHING, PayloadMask
from server.config import Config, Secret

MASK = "***"
SHORTEST = 6
"""Shorter secrets are not looked for: they would be found in words all over. Nothing we write has one in it."""

OTLP_HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
"""Environment variables that hold what a collector asks for, a token as a rule."""

_TOKEN = re.compile(
    r"""
    (?P<scheme>(?:\b|(?<=\\[nrt]))(?:bearer|basic)\s+)[\w.~+/=-]{6,}       # a token after its scheme
  | (?P<header>authorization["']?\s*[:=]\s*["']?)(?!bearer\b|basic\b)[^\s"',;]+(?:[ ][\w.~+/=-]{16,})?
  | (?P<before>(?<![\w-])(?>[\w-]*?(?=eyJ)))eyJ[\w-]{5,}+\.[\w-]{5,}+\.[\w-]*  # a JSON web token
  | (?P<login>://[^\s:/@]*:)[^\s/]*(?=@)                                # a password in a URL
  | (?P<key>password["']?\s*[=:]\s*(?P<quote>["'])?)(?(quote)[^"'\n]+|[^\s"'&,;]+)  # and beside its name
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Its cost is that of one reading: nothing is looked for from more than one place in a run of the same signs."""
_HINT = re.compile(r"bearer|basic|authorization|eyJ|://|password", re.IGNORECASE)


class Mask:
    """Puts `***` in place of what a text must not show. `fields`: those of payloads among it."""

    def __init__(self, secrets: Iterable[Secret] = (), fields: PayloadMask = NOTHING) -> None:
        self.fields = fields
        spellings: set[str] = set()
        for secret in secrets:
            text = secret.reveal()
            if len(text) >= SHORTEST:
                # As it is, as URLs have it, and as it stands within quotes.
                spellings |= {text, quote(text, safe=""), json.dumps(text)[1:-1], repr(text)[1:-1]}
        longest_first = sorted(spellings, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(self, text: str) -> str:
        if self._secrets is not None:
            text = self._secrets.sub(MASK, text)
        text = self.fields.text(text)
        return _TOKEN.sub(_masked, text) if _HINT.search(text) else text


def _masked(found: re.Match[str]) -> str:
    kept = (found[name] for name in ("scheme", "header", "before", "login", "key"))
    return f"{next(filter(None, kept), '')}{MASK}"


def mask_of(config: Config) -> Mask:
    """What a configuration forbids to show: its secrets, and the fields of `observability.redact`."""
    return Mask(secrets_of(config), PayloadMask(config.observability.redact))


def secrets_of(config: Config) -> list[Secret]:
    """Every secret a configuration holds, and those that OpenTelemetry's exporter is given beside it."""
    found = list(_secrets_in(config))
    for variable in OTLP_HEADERS:
        for pair in os.environ.get(variable, "").split(","):
            value = unquote(pair.partition("=")[2].strip())
            # `Bearer abc`: the word is none of it.
            found += [Secret(value), Secret(value.rpartition(" ")[2])]
    return found


def _secrets_in(value: object) -> Iterator[Secret]:
    if isinstance(value, Secret):
        yield value
    elif isinstance(value, Mapping):
        for below in value.values():
            yield from _secrets_in(below)
    elif isinstance(value, tuple | list):
        for below in value:
            yield from _secrets_in(below)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _secrets_in(getattr(value, name))
