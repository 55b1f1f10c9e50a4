"""What only the embedded store promises: durability of the file, one process, order of creation, and
a memory that runs under a virtual clock."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from saga.errors import Unavailable
from saga.model import SagaStatus
from store.errors import StoreInUse
from store.sqlite import open_sqlite
from tests.store.samples import WORKER, StandingClock, created, log_entry, move, running

ROOT = Path(__file__).parents[2]

# Opens the store, writes one saga, says so, and waits to be killed.
HOLDER = """
import sys, trio
from store.sqlite import open_sqlite
from tests.store.samples import log_entry, move, running

async def main():
    async with open_sqlite(sys.argv[1], events=True) as store:
        await store.register_worker("worker-1", 1000)
        saga = await running(store)
        await store.record(move(saga, current_step=1, logs=(log_entry(),)))
        print(saga.saga_id, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def held(path: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that has the file open, and the id of the saga it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


async def test_a_second_process_is_refused_and_what_a_killed_one_wrote_is_there(tmp_path: Path) -> None:
    path = tmp_path / "saga.db"
    process, saga_id = await trio.to_thread.run_sync(held, path)
    try:
        with pytest.raises(StoreInUse, match="in use by another process"):
            async with open_sqlite(path, events=True):
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    async with open_sqlite(path, events=True) as store:
        saga = await store.get(saga_id)
        assert saga is not None
        assert (saga.current_step, saga.owner) == (1, "worker-1")
        assert len(await store.step_logs(saga_id)) == 1
        # Its lease runs for another quarter of an hour, but here nobody else can be alive.
        await store.register_worker("worker-2", 15)
        assert await store.release_expired_workers() == 1
        (claimed,) = await store.claim_due_sagas("worker-2", 10)
        assert claimed.saga.outcome_unknown


async def test_every_commit_is_on_the_disk_before_it_is_told(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "saga.db", events=True) as store:
        for database in (store._writer, store._reader):
            pragmas = {
                name: database._connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


async def test_the_folder_of_the_file_is_made(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "data" / "deep" / "saga.db", events=False) as store:
        await store.ping()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022], ids=oct)
async def test_what_is_made_can_be_read_by_nobody_else_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "a" / "b" / "saga.db"
    before = os.umask(mask)
    try:
        async with open_sqlite(path, events=True) as store:
            await running(store)
            made = {file.name: mode(file) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert made == dict.fromkeys(("saga.db", "saga.db-wal", "saga.db-shm", "saga.db.lock"), 0o600)
    assert mode(path.parent) == mode(path.parent.parent) == 0o700


async def test_a_folder_and_files_that_are_there_keep_their_modes(tmp_path: Path) -> None:
    path = tmp_path / "data" / "saga.db"
    async with open_sqlite(path, events=True):
        pass
    path.parent.chmod(0o750)
    path.chmod(0o640)
    async with open_sqlite(path, events=True) as store:
        await running(store)
        assert mode(path.with_name("saga.db-wal")) == 0o640
    assert (mode(path.parent), mode(path)) == (0o750, 0o640)


async def test_a_path_that_cannot_be_a_file_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "saga.db").mkdir()
    with pytest.raises(Unavailable, match="unable to open"):
        async with open_sqlite(tmp_path / "saga.db", events=False):
            pass


async def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "saga.db").write_bytes(b"not a database at all, but long enough to look at" * 100)
    with pytest.raises(Unavailable, match="not a database"):
        async with open_sqlite(tmp_path / "saga.db", events=False):
            pass


async def test_sagas_of_one_instant_are_claimed_in_the_order_of_their_creation(tmp_path: Path) -> None:
    for path in (":memory:", str(tmp_path / "saga.db")):
        async with open_sqlite(path, events=False, clock=StandingClock()) as store:
            sagas = [await created(store) for _ in range(20)]
            claimed = await store.claim_due_sagas(WORKER, 20)
            assert [one.saga.saga_id for one in claimed] == [saga.saga_id for saga in sagas]


async def test_the_order_of_creation_holds_over_a_restart_with_a_clock_that_went_back(tmp_path: Path) -> None:
    clock = StandingClock()
    async with open_sqlite(tmp_path / "saga.db", events=False, clock=clock) as store:
        first = await created(store)
    clock.advance(-3600)
    async with open_sqlite(tmp_path / "saga.db", events=False, clock=clock) as store:
        second = await created(store)
        assert second.created_at > first.created_at


async def test_a_store_in_memory_never_waits_for_anything_but_its_turn(autojump_clock: trio.testing.MockClock) -> None:
    # Were a thread in it, the virtual clock would jump to the end of the timeout while the thread worked.
    with trio.fail_after(1):
        async with open_sqlite(":memory:", events=True, clock=StandingClock()) as store:
            saga = await running(store)
            saga = (await store.record(move(saga, status=SagaStatus.COMPLETED, logs=(log_entry(),)))).saga
            assert await store.get(saga.saga_id) == saga
            assert store.lanes == ()


async def test_writes_that_come_together_share_commits(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "saga.db", events=False) as store:
        sagas = [await running(store) for _ in range(50)]
        (lane,) = store.lanes
        before = lane.batches
        async with trio.open_nursery() as nursery:
            for saga in sagas:
                nursery.start_soon(store.record, move(saga, current_step=1))
        assert lane.batches - before <= 3
        assert lane.rows == 150
        assert lane.busy_seconds > 0
