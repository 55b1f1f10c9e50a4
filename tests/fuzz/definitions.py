"""Workflow definitions that were damaged on the way: whatever comes of the parser is a definition or every fault with
its path, in bounded time."""

from __future__ import annotations

import re
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from saga.errors import Detail, WorkflowInvalid
from saga.workflow import WorkflowDefinition
from saga.workflow_yaml import parse_workflow

CASE_SECS = 5.0
"""Of the processor, for one text. Most take a millisecond; a collection of garbage may fall into any."""

SERVICES = frozenset({"inventory", "payment"})

BASES = (
    """name: order
timeout_secs: 600
steps:
  - name: reserve
    service: inventory
    method: shop.v1.Inventory.Reserve
    compensate: Inventory.Release
    timeout_secs: 5
    retry: {max_attempts: 3, backoff: exponential, initial_interval_ms: 200, jitter: 0.5}
    compensate_retry:
      max_attempts: 10
      max_interval_ms: 5000
      non_retryable: [INVALID_ARGUMENT, NOT_FOUND]
  - name: charge
    service: payment
    method: Payment.Charge
    on_unknown: compensate
    input:
      order_id: payload.order_id
      amount: {value: steps.reserve.response.total, currency: "'EUR'"}
      lines: [1, true, null, "payload.lines[?qty > `0`].sku"]
""",
    "name: a\nsteps:\n- {name: b, service: inventory, method: A.B}\n",
    '{"name": "json", "steps": [{"name": "x", "service": "payment", "method": "A.B", "input": "payload"}]}',
)

PIECES = (
    *(
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "? ",
        "| ",
        ">",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "<<: ",
        "%YAML 9.9\n",
    ),
    *(
        "---\n",
        "...\n",
        "#",
        "'",
        '"',
        "\\",
        "\t",
        "\0",
        "\ufeff",
        "\u2028",
        "\U0001f600",
        "\ud7ff",
        "\r",
        "\x85",
        "@",
        "`",
    ),
    *("yes", "~", "1e999", "-0", "0x1F", "1_000", ".nan", "9" * 400, "2024-01-01", "1:30", "\n\n", "  ", "\n  "),
    *(
        "name",
        "steps",
        "retry",
        "input",
        "compensate",
        "timeout_secs",
        "max_attempts",
        "payload",
        "steps.charge.response",
    ),
    *(
        "[" * 80,
        "{a: " * 80,
        "(" * 60,
        "a." * 300,
        "[*]" * 100,
        "`1`",
        "&& || !",
        "\n- {}" * 1100,
        "\n" + " " * 400 + "a:",
    ),
)

OF_THE_WHOLE = frozenset(
    {
        *("syntax", "encoding", "empty", "documents", "too_many", "too_large", "too_deep", "type", "key"),
        *("anchor", "alias", "tag"),
    }
)
"""Reasons of faults that are not of one field, or of the outermost map itself."""

_KEY = r'([\w-]+|"(\\.|[^"\\])*")'
_PATH = re.compile(rf"({_KEY}|\[\d+\])(\.{_KEY}|\[\d+\])*")


@st.composite
def damaged(draw: st.DrawFn) -> str | bytes:
    """A definition after one to eight accidents."""
    text = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 8))):
        text = _damage(draw, text)
    if draw(st.integers(0, 9)) == 0:
        raw = bytearray(text.encode("utf-8", "replace"))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(raw)))
            raw[at:at] = draw(st.binary(min_size=1, max_size=4))
        return bytes(raw)
    return text


def _damage(draw: st.DrawFn, text: str) -> str:
    start = draw(st.integers(0, len(text)))
    end = min(len(text), start + draw(st.integers(0, 60)))
    lines = text.split("\n")
    number = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return text[:start] + text[end:] or "\n"
    if kind == 1:
        return text[:end] + text[start:end] * draw(st.integers(1, 50)) + text[end:]
    if kind == 2:
        return text[:start] + draw(st.sampled_from(PIECES)) + text[start:]
    if kind == 3:
        return text[:start] + draw(st.text(max_size=20)) + text[end:]
    if kind == 4:
        lines[number] = " " * draw(st.integers(0, 8)) + lines[number].lstrip()
    elif kind == 5:
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {draw(st.sampled_from(PIECES))}"
    elif kind == 6:
        lines.insert(draw(st.integers(0, len(lines))), lines[number])
    else:
        other = draw(st.integers(0, len(lines) - 1))
        lines[number], lines[other] = lines[other], lines[number]
    return "\n".join(lines)


def check(text: str | bytes) -> str:
    """What came of the parser, in a word; `AssertionError`: something that must not."""
    started = time.thread_time()
    found: WorkflowDefinition | None = None
    details: tuple[Detail, ...] = ()
    try:
        found = parse_workflow(text, SERVICES)
    except WorkflowInvalid as invalid:
        details = invalid.details
    took = time.thread_time() - started
    assert took < CASE_SECS, (took, text)
    if found is not None:
        assert isinstance(found, WorkflowDefinition)
        assert found.steps
        return "taken"
    assert details, text
    for detail in details:
        assert detail.message, detail
        assert detail.reason, detail
        assert detail.field or detail.reason in OF_THE_WHOLE, detail
        assert not detail.field or _PATH.fullmatch(detail.field), detail
        assert detail.line is None or (detail.line >= 1 and (detail.column or 0) >= 1), detail
    return "refused"


def run(cases: int, number: int | None = None) -> Counter[str]:
    """Checks so many; without `number` they are the same each time. How many were taken and refused."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged())
    def each(text: str | bytes) -> None:
        seen[check(text)] += 1

    (each if number is None else seed(number)(each))()
    return seen
