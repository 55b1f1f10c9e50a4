"""Registers the workflows of a folder at the start of a server, or when the folder has come."""

from __future__ import annotations

import logging
import os.path
from pathlib import Path
from typing import NamedTuple

import trio

from saga.errors import Unavailable
from saga.readiness import Readiness, WorkflowsState
from saga.runner import STORE_PAUSE_SECS
from saga.service import RegisteredWorkflow, SagaService
from saga.store_outage import StoreOutage
from saga.workflow_files import content_of, faults_of, files_in

log = logging.getLogger("saga.server")

LOOK_SECS = 5.0
"""Between two looks for a folder that is missing. A guess."""


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


async def keep_looking(
    service: SagaService,
    folder: Path,
    readiness: Readiness,
    outage: StoreOutage,
    *,
    is_folder_optional: bool,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Loads the folder and tells readiness what came of it, then says that it has started. A folder that should be
    there is looked for until it is: a volume may be mounted late."""
    readiness.workflows = (await load_workflows(service, folder, outage)).state(is_folder_optional=is_folder_optional)
    task_status.started()
    while readiness.workflows is WorkflowsState.MISSING:
        await trio.sleep(LOOK_SECS)
        # Not `Path.is_dir`: of a folder that cannot be looked at, as in one that may not be entered, it raises.
        if await trio.to_thread.run_sync(os.path.isdir, folder):
            loaded = await load_workflows(service, folder, outage)
            readiness.workflows = loaded.state(is_folder_optional=is_folder_optional)


async def load_workflows(service: SagaService, folder: Path, outage: StoreOutage | None = None) -> Loaded:
    """Registers the definitions in a folder, by file name. A bad file is reported, line by line, and the others still
    load."""
    seen: dict[str, Path] = {}
    rejected: list[Path] = []
    try:
        contents = await trio.to_thread.run_sync(_contents_of, folder)
    except OSError as error:
        log.warning("workflow_dir_missing folder=%s error=%s", folder, error.strerror or error)
        return Loaded(0, found=False)
    for file, content in contents:
        # Two files of one name: each start would register the one and then the other, a new version every time.
        if faults := faults_of(file, content, service.known_services, seen):
            rejected.append(file)
            for fault in faults:
                log.error("workflow_rejected problem=%s", fault)
        elif isinstance(content, bytes):
            _tell(file, await _registered(service, content, outage or StoreOutage()))
    log.info("workflows_loaded folder=%s count=%d rejected=%d", folder, len(seen), len(rejected))
    return Loaded(len(seen), tuple(rejected))


def _contents_of(folder: Path) -> list[tuple[Path, bytes | OSError]]:
    """Of each file. Raises `OSError` for the folder; that of a file is in the place of its content."""
    return [(file, content_of(file)) for file in files_in(folder)]


def _tell(file: Path, registered: RegisteredWorkflow) -> None:
    name, version = registered.workflow.definition.name, registered.workflow.version
    if registered.superseded:
        log.warning("workflow_superseded file=%s name=%s version=%d", file, name, version)
    elif registered.changed:
        log.info("workflow_registered file=%s name=%s version=%d", file, name, version)


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
