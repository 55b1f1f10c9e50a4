"""Registers the workflows of a folder at the start of a server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import trio

from saga.errors import Unavailable, WorkflowInvalid
from saga.readiness import WorkflowsState
from saga.runner import STORE_PAUSE_SECS
from saga.service import RegisteredWorkflow, SagaService
from saga.store_outage import StoreOutage
from saga.workflow_files import files_in
from saga.workflow_yaml import MAX_YAML_BYTES, format_detail, parse_workflow

log = logging.getLogger("saga.server")


class Loaded(NamedTuple):
    """What came of a folder of workflows: how many files are good, and which are not. `found` False: there is none."""

    good: int
    rejected: tuple[Path, ...] = ()
    found: bool = True

    def state(self, *, is_folder_optional: bool) -> WorkflowsState:
        """What readiness tells of it."""
        if not self.found and not is_folder_optional:
            return WorkflowsState.MISSING
        return WorkflowsState.REJECTED if self.rejected else WorkflowsState.LOADED


async def load_workflows(service: SagaService, folder: Path, outage: StoreOutage | None = None) -> Loaded:
    """Registers the definitions in a folder, by file name. A bad file is reported, line by line, and the others still
    load."""
    outage = outage or StoreOutage()
    seen: dict[str, Path] = {}
    rejected: list[Path] = []
    try:
        files = await trio.to_thread.run_sync(_workflow_files, folder)
    except OSError as error:
        log.warning("workflow_dir_missing folder=%s error=%s", folder, error.strerror or error)
        return Loaded(0, found=False)
    for file, text in files:
        try:
            if isinstance(text, OSError):
                raise text
            name = parse_workflow(text, service.known_services).name
            if name in seen:
                # Each start would register the one and then the other, a new version every time.
                log.error(
                    "workflow_rejected problem=%s", f"{file}: name: workflow {name} is defined in {seen[name]} too"
                )
                rejected.append(file)
                continue
            registered = await _registered(service, text, outage)
            if registered.superseded:
                log.warning("workflow_superseded file=%s name=%s version=%d", file, name, registered.workflow.version)
            elif registered.changed:
                log.info("workflow_registered file=%s name=%s version=%d", file, name, registered.workflow.version)
        except WorkflowInvalid as invalid:
            for detail in invalid.details:
                log.error("workflow_rejected problem=%s", format_detail(file, detail))
            rejected.append(file)
        except OSError as error:
            log.error("workflow_rejected problem=%s", f"{file}: cannot be read: {error.strerror or error}")
            rejected.append(file)
        else:
            seen[name] = file
    log.info("workflows_loaded folder=%s count=%d rejected=%d", folder, len(seen), len(rejected))
    return Loaded(len(seen), tuple(rejected))


def _workflow_files(folder: Path) -> list[tuple[Path, bytes | OSError]]:
    """What is in each file. Raises `OSError` for the folder; that of a file is in the place of its content."""
    found: list[tuple[Path, bytes | OSError]] = []
    for file in files_in(folder):
        try:
            with file.open("rb") as opened:
                found.append((file, opened.read(MAX_YAML_BYTES + 1)))
        except OSError as error:
            found.append((file, error))
    return found


async def _registered(service: SagaService, text: bytes, outage: StoreOutage) -> RegisteredWorkflow:
    """Registers a file's definition; waits for a store that is away, as the rest of the start does."""
    pause_secs, longest = STORE_PAUSE_SECS
    while True:
        try:
            return await service.register_workflow(text, unless_superseded=True)
        except Unavailable as error:
            outage.failed("workflows", error)
        await trio.sleep(pause_secs)
        pause_secs = min(pause_secs * 2, longest)
