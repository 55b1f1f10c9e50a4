"""Files of workflows: which of a folder are some, and what is wrong with them. Nothing is registered here."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from saga.errors import Detail, WorkflowInvalid
from saga.workflow_yaml import MAX_YAML_BYTES, format_detail, parse_workflow

SUFFIXES = frozenset({".yaml", ".yml"})


class FileFault(msgspec.Struct, frozen=True):
    """One error in a file. As text, a line that an editor can jump to."""

    file: Path
    detail: Detail

    def __str__(self) -> str:
        return format_detail(self.file, self.detail)


def files_in(folder: Path) -> list[Path]:
    """The workflow files of a folder, by name; not those of folders in it. Raises OSError."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def check_files(paths: Iterable[str | Path], services: Collection[str] | None = None) -> list[FileFault]:
    """Every error in the files, and in those of the folders, among `paths`; none: all are good.

    A file that cannot be read is an error like another, as is a folder without any, and so is a second file with the
    name of a workflow seen before: of the two, each start of the server would register the one and then the other.
    """
    faults: list[FileFault] = []
    seen: dict[str, Path] = {}
    for path in map(Path, paths):
        try:
            files = files_in(path) if path.is_dir() else [path]
        except OSError as error:
            faults.append(_unread(path, error))
            continue
        if not files:
            faults.append(_fault(path, "missing", "no file in it ends in .yaml or .yml"))
        for file in files:
            faults += faults_of(file, content_of(file), services, seen)
    return faults


def content_of(file: Path) -> bytes | OSError:
    """What is in a file, or why it cannot be read. Of one that is too long, one byte more than may be."""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        return error


def faults_of(
    file: Path, content: bytes | OSError, services: Collection[str] | None, seen: dict[str, Path]
) -> list[FileFault]:
    """The errors of one file; a good one is put into `seen` by the name of its workflow."""
    if isinstance(content, OSError):
        return [_unread(file, content)]
    try:
        name = parse_workflow(content, services).name
    except WorkflowInvalid as invalid:
        return [FileFault(file, detail) for detail in invalid.details]
    if name in seen:
        return [_fault(file, "duplicate", f"workflow {name} is defined in {seen[name]} too", field="name")]
    seen[name] = file
    return []


def _fault(file: Path, reason: str, message: str, *, field: str = "") -> FileFault:
    return FileFault(file, Detail(field=field, reason=reason, message=message))


def _unread(path: Path, error: OSError) -> FileFault:
    return _fault(path, "unreadable", f"cannot be read: {error.strerror or error}")
