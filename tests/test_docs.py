"""What the documents say that can be compared with the code."""

import re
from pathlib import Path

from saga.model import TERMINAL
from saga.transitions import TRANSITIONS

ROOT = Path(__file__).resolve().parent.parent
ARROW = re.compile(r"^ +(\S+) --> (\S+?)(?:: (\w+))?$", re.MULTILINE)


def test_the_state_diagram_has_every_arrow_of_the_table_and_no_other() -> None:
    text = (ROOT / "docs/semantics.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", text, re.DOTALL)
    drawn = ARROW.findall(diagram)

    moves = [(str(state), str(to), fact.__name__) for state, row in TRANSITIONS.items() for fact, to in row.items()]
    ends = [("[*]", "STARTED", ""), *((str(state), "[*]", "") for state in TERMINAL)]
    assert sorted(drawn) == sorted(moves + ends)
    assert len(drawn) == len(diagram.strip().splitlines())


def test_every_link_between_the_documents_leads_to_a_file() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert broken == []
