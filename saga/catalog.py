"""Workflows by name and version, kept in memory; the store is asked only for what is not known or may have changed."""

from __future__ import annotations

import trio

from saga.errors import NotFound
from saga.ports import Store
from saga.workflow import Workflow

LATEST_FOR_SECS = 1.0
"""How long "the newest version" may be answered from memory. A registration in this process is seen at once; one made
by another worker when its notice comes, or, should that be lost, after this long. A guess that keeps a read off the
path of a start."""

KEPT_VERSIONS = 1000
"""How many definitions are kept, those used last. A guess: most are a kilobyte or so, and few are in use at a time."""


class Catalog:
    """A (name, version) never changes, so it is kept while it is used; which version is newest is kept for a moment."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: dict[tuple[str, int], Workflow] = {}
        self._newest: dict[str, tuple[float, Workflow]] = {}
        self._registrations = 0

    def note(self, workflow: Workflow) -> None:
        """A registration just made here."""
        self._registrations += 1
        self._newest.pop(workflow.definition.name, None)
        self._keep(workflow)

    def forget_newest(self, name: str | None = None) -> None:
        """Another worker has registered a version of this workflow, or, without a name, may have of any."""
        self._registrations += 1
        if name is None:
            self._newest.clear()
        else:
            self._newest.pop(name, None)

    async def newest(self, name: str) -> Workflow:
        """The version new sagas start on. `NotFound`: no workflow of that name."""
        known = self._newest.get(name)
        if known is not None and trio.current_time() < known[0]:
            return known[1]
        registrations = self._registrations
        workflow = await self._store.workflow(name)
        if workflow is None:
            raise NotFound(f"workflow not found: {name}")
        self._keep(workflow)
        # What was read while a registration was made may be the version before it: good for this caller, not for later.
        if registrations == self._registrations:
            self._newest.pop(name, None)  # so that it is the last to go
            self._newest[name] = (trio.current_time() + LATEST_FOR_SECS, workflow)
            if len(self._newest) > KEPT_VERSIONS:
                del self._newest[next(iter(self._newest))]
        return workflow

    async def version(self, name: str, version: int) -> Workflow:
        """The definition a saga began with. `NotFound`: it is not in the store."""
        workflow = self._versions.get((name, version))
        if workflow is None:
            workflow = await self._store.workflow(name, version)
            if workflow is None:
                raise NotFound(f"workflow not found: {name} version {version}")
        self._keep(workflow)
        return workflow

    def _keep(self, workflow: Workflow) -> None:
        """As the one used last; the one that was not used for longest goes."""
        key = (workflow.definition.name, workflow.version)
        self._versions.pop(key, None)
        self._versions[key] = workflow
        if len(self._versions) > KEPT_VERSIONS:
            del self._versions[next(iter(self._versions))]
