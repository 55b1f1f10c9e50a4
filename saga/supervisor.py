"""All sagas of this worker: admit, claim, keep the lease, cancel, drain.

One nursery a saga, so that an error in one is caught here and never reaches another. At most `max_concurrent` sagas are
in memory; the others wait in the store and are claimed, oldest first, as places become free.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import trio

from saga.catalog import Catalog
from saga.errors import LeaseLost, SagaError, Unavailable
from saga.log_fields import about_saga
from saga.model import Saga, SagaStatus
from saga.ports import CancelAccepted, Claimed, Notice, NoticesMissed, SagasDue, WorkflowAdded
from saga.runner import STORE_PAUSE_SECS, Engine, SagaRun
from saga.workflow import Workflow

log = logging.getLogger("saga.supervisor")

CRASH_PAUSE_SECS = 30.0
"""How long a saga that met an error of our own, or a worker without its services, is left alone before it is tried
again: long enough not to burn a core on a saga that always fails, short enough that a fixed cause is noticed the same
minute."""

POLL_SECS = 1.0
"""How often the store is asked for due and orphaned sagas when nothing says there are any. Sagas become due and leases
end without a notice, and a notice may be lost. With what a claim takes it bounds the take-over of a dead worker's sagas
to its lease and two seconds."""

CLAIM_PAGE = 200
"""Sagas taken up by one claim, which the lease's renewal may have to wait for and whose payloads are held at once: some
30 ms where they are small. A guess; the next claim follows when these have been begun."""

LATEST_LANDING_SECS = 60.0
"""How long after it was given up a write may still land. The stores bound what they ask the database for to 30 s."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Section `saga` of the configuration, as far as it concerns the engine."""

    max_concurrent: int = 100
    lease_secs: float = 15.0
    shutdown_grace_secs: float = 30.0


class Place:
    """Room for one saga that is about to be created. `owner`: what to create it with, None when it has to wait."""

    def __init__(self, supervisor: Supervisor, owner: str | None) -> None:
        self._supervisor = supervisor
        self.owner = owner

    def fill(self, saga: Saga, workflow: Workflow) -> None:
        """The saga exists now, durably, with this place's owner."""
        self._supervisor.saga_created(saga, workflow, owned=self.owner is not None)


class Supervisor:
    """Runs this worker's sagas. `run` is its one background task; the other methods are called by the service."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        worker_id: str,
        limits: Limits,
        services: Collection[str] | None = None,
    ) -> None:
        """`services`: the participants that can be called from here; None: all that a workflow names."""
        self._engine = engine
        self._catalog = catalog
        self._limits = limits
        self._services = services
        self._name = worker_id
        self._lives = 1
        self.worker_id = worker_id
        """The name it owns sagas under; another one after each lease it has lost."""
        self._runs: dict[str, SagaRun] = {}
        self._reserved = 0
        self._nursery: trio.Nursery | None = None
        self._holds_lease = False
        self._lease_ends = 0.0
        # Until then the store may hold sagas that are ours and that nobody runs: a creation or a claim was answered by
        # an error although it happened, or is still to happen.
        self._doubt_ends: float | None = None
        self._being_created: set[str] = set()
        # Sagas may be waiting in the store, older than any that is started now: they go first.
        self._backlog = True
        # Another worker has told of a saga that is due. It may take that one itself, so this holds up no start here.
        self._told_of_work = False
        self._cancels_unread = False
        self._changed = trio.Event()
        self._until_ended = trio.lowlevel.ParkingLot()
        # Cancel requests for sagas that are just being created or claimed and so have no run yet.
        self._early_cancels: set[str] = set()
        self.is_draining = False

    @property
    def active(self) -> int:
        """Sagas in memory."""
        return len(self._runs)

    @property
    def holds_lease(self) -> bool:
        """Whether this worker may run sagas: it has its lease, and the lease has not ended."""
        # The clock is asked too: after this process was held up, the lease may be over before its loop has noticed.
        return self._holds_lease and trio.current_time() < self._lease_ends

    @property
    def room(self) -> int:
        """Places that are free."""
        return self._limits.max_concurrent - len(self._runs) - self._reserved

    @property
    def _may_take_more(self) -> bool:
        return self.holds_lease and not self.is_draining

    # --- what the service calls --------------------------------------------------------------------------------------

    @contextmanager
    def place(self, saga_id: str) -> Iterator[Place]:
        """Holds a place while a saga is being created, if there is one and nobody older is waiting for it."""
        free = self._may_take_more and not self._backlog and self.room > 0
        self._reserved += free
        self._being_created.add(saga_id)
        try:
            yield Place(self, self.worker_id if free else None)
        except BaseException:
            if free:
                self._doubt()
            raise
        finally:
            self._being_created.discard(saga_id)
            self._unreserve(int(free))

    def saga_created(self, saga: Saga, workflow: Workflow, *, owned: bool) -> None:
        self._engine.meter.saga_started(saga.workflow_name)
        if owned and self._nursery is not None and not self._nursery.cancel_scope.cancel_called:
            self._start(Claimed(saga=saga), workflow)
        elif owned:
            # Stopped meanwhile: `drain` frees it, or its lease.
            log.info("saga_left_to_others saga_id=%s", saga.saga_id)
        else:
            self.wake()

    def cancel(self, saga_id: str) -> bool:
        """Passes a cancel request, already durable, to the run of that saga. False: it does not run here."""
        run = self._runs.get(saga_id)
        if run is None:
            if self._reserved:
                self._early_cancels.add(saga_id)
            return False
        run.request_cancel()
        return True

    def wake(self) -> None:
        """There may be something to claim."""
        self._backlog = True
        self._changed.set()

    def notice(self, notice: Notice) -> None:
        """What the store tells of other workers' doings."""
        match notice:
            case SagasDue():
                self._told_of_work = True
                self._changed.set()
            case CancelAccepted():
                if notice.owner == self.worker_id:
                    self.cancel(notice.saga_id)
            case WorkflowAdded():
                self._catalog.forget_newest(notice.name)
            case NoticesMissed():
                self._catalog.forget_newest()
                self._told_of_work = self._cancels_unread = True
                self._changed.set()

    # --- the background task -----------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until `drain` has ended. Ready when this worker has its lease and may own sagas."""
        await self._join()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._lease_loop)
            nursery.start_soon(self._claim_loop)
            nursery.start_soon(self._engine.store.listen, self.notice)
            task_status.started()
        self._nursery = None

    async def drain(self) -> None:
        """Takes nothing new, lets running attempts finish for `shutdown_grace_secs`, cuts off the rest, frees all sagas
        of this worker so that others take them at once."""
        self.is_draining = True
        self.wake()
        for run in self._runs.values():
            run.stop()
        with trio.move_on_after(self._limits.shutdown_grace_secs):
            await self._until_idle()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        # Writes under way are not abandoned; they land before the sagas are freed, or are refused after it.
        with trio.move_on_after(5, shield=True):
            await self._until_idle()
        # Its own deadline: a store that is away must not hold up the exit; the lease then runs out by itself.
        with trio.move_on_after(5, shield=True):
            try:
                await self._engine.store.remove_worker(self.worker_id)
            except Unavailable as error:
                log.warning("worker_not_removed worker_id=%s error=%s", self.worker_id, error)

    async def _until_idle(self) -> None:
        while self._runs or self._reserved:
            await self._until_ended.park()

    async def _join(self) -> None:
        """Takes the lease; waits for the store if it is away."""
        pause_secs, longest = STORE_PAUSE_SECS
        while True:
            try:
                freed = await self._engine.store.release_expired_workers()
                self._engine.meter.sagas_freed(freed)
                _note_freed(freed)
                now = trio.current_time()
                await self._engine.store.register_worker(self.worker_id, self._limits.lease_secs)
            except Unavailable as error:
                self._engine.outage.failed("leases", error)
                await trio.sleep(pause_secs)
                pause_secs = min(pause_secs * 2, longest)
            else:
                self._engine.outage.answered("leases")
                # An answer that took longer leaves too little of the lease to begin anything on the strength of it.
                if trio.current_time() < now + self._limits.lease_secs / 3:
                    self._lease_ends = now + self._limits.lease_secs
                    self._holds_lease = True
                    return

    async def _rejoin(self) -> None:
        """Starts over after a lost lease, under a new name: a write that was given up under the old one may still land,
        however late, and must not free what is claimed from now on."""
        try:
            await self._engine.store.remove_worker(self.worker_id)
        except Unavailable as error:
            # What it still has under that name is free when its lease ends.
            self._engine.outage.failed("leases", error)
        self._lives += 1
        self.worker_id = f"{self._name}/{self._lives}"
        await self._join()
        self.wake()

    async def _lease_loop(self) -> None:
        """Renews the lease three times as often as it must, and more often when that fails; without it all runs stop
        before others may claim them: a fifth of the lease is kept for that."""
        lease_secs = self._limits.lease_secs
        due = self._lease_ends - lease_secs * 2 / 3
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            last = self._lease_ends - lease_secs / 5
            try:
                with trio.fail_after(max(0.0, min(lease_secs / 3, last - now))):
                    held = await self._engine.store.renew_lease(self.worker_id, lease_secs)
            except (Unavailable, trio.TooSlowError) as error:
                reason = str(error) or "it takes too long to renew the lease"
                self._engine.outage.failed("leases", reason)
                log.debug("lease_not_renewed worker_id=%s error=%s", self.worker_id, reason)
                due = trio.current_time() + lease_secs / 15
                if due < last:
                    continue
                held = False
            if held:
                self._engine.outage.answered("leases")
                self._lease_ends = now + lease_secs
                due = now + lease_secs / 3
                continue
            log.error("lease_lost worker_id=%s sagas=%d", self.worker_id, len(self._runs))
            self._engine.meter.worker_lease_lost()
            self._holds_lease = False
            for run in self._runs.values():
                run.scope.cancel()
            await self._until_idle()
            await self._rejoin()
            due = self._lease_ends - lease_secs * 2 / 3

    async def _claim_loop(self) -> None:
        """Fills free places from the store: at start, whenever one becomes free while sagas wait, when another worker
        tells of some, and now and then."""
        next_sweep = trio.current_time() + POLL_SECS
        while True:
            changed = self._changed = trio.Event()
            try:
                if trio.current_time() >= next_sweep:
                    next_sweep = trio.current_time() + POLL_SECS
                    freed = await self._engine.store.release_expired_workers()
                    self._engine.meter.sagas_freed(freed)
                    _note_freed(freed)
                    self._backlog |= freed > 0
                    await self._release_what_nobody_runs()
                    await self._pass_on_cancel_requests()
                    claimed = await self.claim_once()
                    self._engine.outage.answered("claims")
                else:
                    if self._cancels_unread:
                        await self._pass_on_cancel_requests()
                    claimed = await self.claim_once() if self._backlog or self._told_of_work else 0
            except Unavailable as error:
                self._engine.outage.failed("claims", error)
                log.debug("claim_failed error=%s", error)
                claimed = 0
                await trio.sleep(POLL_SECS)
            if claimed and self.room > 0:
                continue
            with trio.move_on_at(next_sweep):
                await changed.wait()

    def _doubt(self) -> None:
        """An unanswered write may have given us a saga that we do not know of, and may do so for some time yet."""
        self._doubt_ends = trio.current_time() + LATEST_LANDING_SECS

    async def _release_what_nobody_runs(self) -> None:
        if self._doubt_ends is not None and self._holds_lease:
            began = trio.current_time()
            owned = await self._engine.store.owned(self.worker_id)
            # Nothing begins these any more: claims are made by this very task, and raise the epoch. What has ended or
            # left since the store was asked is not touched.
            unknown = [saga for saga in owned if saga.saga_id not in {*self._runs, *self._being_created}]
            for saga in unknown:
                interrupted = saga.status is SagaStatus.RUNNING
                self._backlog |= await self._engine.store.release(saga, interrupted=interrupted)
            # Only a look that was seen through, and began when nothing could land any more, was the last one.
            if began >= self._doubt_ends:
                self._doubt_ends = None

    async def _pass_on_cancel_requests(self) -> None:
        """Those that another worker accepted; ours reach their runs at once."""
        self._cancels_unread = False
        if self._runs:
            for saga_id in await self._engine.store.cancel_requests(self.worker_id):
                if (run := self._runs.get(saga_id)) is not None:
                    run.request_cancel()

    async def claim_once(self) -> int:
        """One pass: claims up to the free places, half of them when it is not known that anybody waits, a page at most.
        Returns how many sagas were taken up."""
        room = self.room
        if room <= 0 or not self._may_take_more:
            return 0
        if not self._backlog:
            # The other half is for sagas that are started meanwhile. Without it these would wait, each wait would be
            # told to all workers, and their claims would make the next starts wait.
            room = (room + 1) // 2
        # Held while the claim is under way, so that a start cannot take the same places.
        self._reserved += room
        self._backlog = self._told_of_work = False
        asked = False
        asked_at = trio.current_time()
        try:
            limit = min(room, CLAIM_PAGE)
            claimed = await self._engine.store.claim_due_sagas(self.worker_id, limit)
            asked = True
            self._engine.meter.sagas_claimed(len(claimed))
            self._backlog |= len(claimed) >= limit  # more, where the answer to an earlier claim was lost
            for number, one in enumerate(claimed):
                if self._runs_already(one.saga):
                    continue  # the answer to an earlier claim came after all
                try:
                    workflow = await self._catalog.version(one.saga.workflow_name, one.saga.workflow_version)
                except Unavailable:
                    await self._give_back([late.saga for late in claimed[number:] if not self._runs_already(late.saga)])
                    raise
                except SagaError as error:
                    with about_saga(one.saga):
                        await self._put_aside(one.saga, error)
                    continue
                if self._services is not None and (missing := workflow.definition.services.difference(self._services)):
                    with about_saga(one.saga):
                        await self._leave_to_others(one.saga, missing)
                else:
                    self._start(one, workflow, told_within_secs=trio.current_time() - asked_at)
        finally:
            if not asked:
                self._backlog = True
                self._doubt()
            self._unreserve(room)
        return len(claimed)

    def _runs_already(self, saga: Saga) -> bool:
        run = self._runs.get(saga.saga_id)
        return run is not None and run.saga.epoch == saga.epoch

    async def _give_back(self, sagas: Sequence[Saga]) -> None:
        """Claimed, but the store went away before they could be begun: nothing of theirs is in doubt."""
        self._backlog = True
        for saga in sagas:
            try:
                await self._engine.store.release(saga, interrupted=False)
            except Unavailable:
                self._doubt()

    async def _leave_to_others(self, saga: Saga, missing: Collection[str]) -> None:
        """A lack of this worker's configuration must not fail a saga, least of all its undo: others may have the
        service, or this one will once it is started with it."""
        log.error("service_not_configured saga_id=%s services=%s", saga.saga_id, ",".join(sorted(missing)))
        try:
            await self._engine.store.release(saga, interrupted=False, retry_in_secs=CRASH_PAUSE_SECS)
        except Unavailable:
            self._doubt()

    def _unreserve(self, places: int) -> None:
        self._reserved -= places
        if not self._reserved:
            self._early_cancels.clear()
        if places:
            self._room_made()

    def _room_made(self) -> None:
        self._until_ended.unpark_all()
        if self._backlog or self._told_of_work:
            self._changed.set()

    # --- one saga ----------------------------------------------------------------------------------------------------

    def _start(self, claimed: Claimed, workflow: Workflow, *, told_within_secs: float = 0.0) -> None:
        run = SagaRun(self._engine, claimed, workflow, told_within_secs=told_within_secs)
        if not self._holds_lease:
            run.scope.cancel()  # lost while this saga was on its way to us
        if self.is_draining:
            run.stop()
        if claimed.saga.saga_id in self._early_cancels:
            run.request_cancel()
        self._runs[claimed.saga.saga_id] = run
        assert self._nursery is not None  # places are only given, and claims only made, while `run` runs
        self._nursery.start_soon(self._supervise, run)

    async def _supervise(self, run: SagaRun) -> None:
        with about_saga(run.saga):
            if run.saga.status is not SagaStatus.STARTED:
                log.info(
                    "saga_resumed saga_id=%s status=%s epoch=%d", run.saga.saga_id, run.saga.status, run.saga.epoch
                )
            await self._see_through(run)

    async def _see_through(self, run: SagaRun) -> None:
        saga_id = run.saga.saga_id
        try:
            with run.scope:
                async with trio.open_nursery():
                    await run.run()
        except* LeaseLost:
            log.warning("lease_lost saga_id=%s epoch=%d", saga_id, run.saga.epoch)
            self._engine.meter.lease_lost()
        except* Unavailable as errors:
            # Only met when it was to be freed; moves wait for the store.
            self._engine.outage.failed("releases", errors.exceptions[0])
            log.debug("saga_not_released saga_id=%s error=%s", saga_id, errors.exceptions[0])
            self._doubt()
        except* Exception as errors:  # noqa: BLE001  # one saga's bug never ends another saga
            await self._put_aside(run.saga, errors)
        finally:
            # A saga that was parked may have been claimed again, by this very worker, before its old run got here.
            if self._runs.get(saga_id) is run:
                del self._runs[saga_id]
            if run.saga.cancel_requested and not run.saga.status.is_terminal:
                self._backlog = True  # parked although a cancel had come: it is due at once
            self._room_made()

    async def _put_aside(self, saga: Saga, error: BaseException) -> None:
        """Our own bug, or a definition that is gone: the saga is freed and left alone for a while; others go on."""
        log.error("saga_crashed saga_id=%s", saga.saga_id, exc_info=error)
        self._engine.meter.saga_crashed()
        try:
            await self._engine.store.release(saga, interrupted=True, retry_in_secs=CRASH_PAUSE_SECS)
        except Exception as again:  # noqa: BLE001  # the last line of defence between one saga and all others
            log.error("saga_not_released saga_id=%s error=%s", saga.saga_id, again)
            self._doubt()


def _note_freed(count: int) -> None:
    if count:
        log.info("sagas_freed count=%d reason=%s", count, "the lease of the worker that had them has ended")
