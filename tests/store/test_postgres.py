"""What only the Postgres store promises: batches of one round trip, answers that never come."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from bridge import open_loop, run_aio
from saga.errors import RowRejected, Unavailable
from saga.model import Saga
from saga.ports import Recorded
from store.postgres import PostgresStore, open_postgres
from store.postgres_connections import READER_SESSION, Link
from store.queries import Dialect, load
from tests.store.samples import WORKER, created, log_entry, move, new_saga, running
from tests.support.postgres import PostgresServer, ask

# --- batches ----------------------------------------------------------------------------------------------------------


async def test_nul_in_json_which_jsonb_cannot_hold_is_refused_alone(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        sagas = [await running(store) for _ in range(6)]
        results: dict[str, Recorded | RowRejected] = {}

        async def write(saga: Saga, text: str) -> None:
            try:
                record = move(saga, current_step=1, logs=(log_entry(response_payload={"text": text}),))
                results[saga.saga_id] = await store.record(record)
            except RowRejected as error:
                results[saga.saga_id] = error

        async with trio.open_nursery() as nursery:
            for place, saga in enumerate(sagas):
                nursery.start_soon(write, saga, "nul \0" if place == 3 else "fine")
        refused = [saga.saga_id for saga in sagas if isinstance(results[saga.saga_id], RowRejected)]
        assert refused == [sagas[3].saga_id]
        with pytest.raises(RowRejected):
            await store.create(new_saga(payload={"nul": "\0"}))
        with pytest.raises(RowRejected):
            await store.create(new_saga(initiated_by="nul \0"))


async def test_many_writes_share_one_statement(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        sagas = [await running(store) for _ in range(60)]
        moves = store.lanes[1:]
        before = sum(lane.batches for lane in moves)
        async with trio.open_nursery() as nursery:
            for saga in sagas:
                nursery.start_soon(store.record, move(saga, current_step=1, logs=(log_entry(),)))
        assert sum(lane.batches for lane in moves) - before <= 3


async def test_two_processes_never_claim_the_same_saga(postgres_dsn: str) -> None:
    """Two stores: connections of their own, as in two processes."""
    async with (
        open_loop(),
        open_postgres(postgres_dsn, events=False) as one,
        open_postgres(postgres_dsn, events=False) as other,
    ):
        sagas = [await created(one) for _ in range(40)]
        taken: list[str] = []

        async def claim(store: PostgresStore, worker: str) -> None:
            while claimed := await store.claim_due_sagas(worker, 3):
                taken.extend(entry.saga.saga_id for entry in claimed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim, one, "worker-1")
            nursery.start_soon(claim, other, "worker-2")
        assert sorted(taken) == sorted(saga.saga_id for saga in sagas)


async def test_a_claim_does_not_wait_for_a_saga_that_another_transaction_holds(postgres_dsn: str) -> None:
    async def hold(connection: Any) -> None:
        await connection.execute("BEGIN")
        await connection.execute("SELECT FROM saga.saga_states WHERE id = $1::uuid FOR UPDATE", held.saga_id)

    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        held, free = await created(store), await created(store)
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(hold))
        with trio.fail_after(5):
            assert [one.saga.saga_id for one in await store.claim_due_sagas(WORKER, 10)] == [free.saga_id]
        await run_aio(other.close())
        assert [one.saga.saga_id for one in await store.claim_due_sagas(WORKER, 10)] == [held.saga_id]


async def hold(saga_id: str, connection: Any) -> None:
    """Begins a transaction that has changed this row, and leaves it open."""
    await connection.execute("BEGIN")
    await connection.execute("UPDATE saga.saga_states SET error_message = 'x' WHERE id = $1::uuid", saga_id)


async def blocked_on_a_lock(dsn: str) -> None:
    """Returns when somebody waits for a row."""
    blocked = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with trio.fail_after(20):
        while not await trio.to_thread.run_sync(ask, dsn, blocked):
            pass


async def test_a_row_that_somebody_has_locked_holds_up_neither_sweeps_nor_leases(postgres_dsn: str) -> None:
    """A person at a prompt, or a worker that stands still."""
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store:
        await store.register_worker(WORKER, 60.0)
        held, free = await created(store, owner="gone"), await created(store, owner="gone")
        mine = await created(store, owner="leaving")
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(partial(hold, held.saga_id)))
        with trio.fail_after(5):
            assert await store.release_expired_workers() == 2
            assert await store.renew_lease(WORKER, 60.0)
        assert [one.saga.saga_id for one in await store.claim_due_sagas("leaving", 9)] == [free.saga_id, mine.saga_id]
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        await run_aio(other.exchange(partial(hold, mine.saga_id)))
        with trio.fail_after(5):
            await store.remove_worker("leaving")
        after = [await store.get(saga.saga_id) for saga in (held, free, mine)]
        assert [saga is not None and saga.owner for saga in after] == ["gone", None, "leaving"]
        # What asks for this very row gives up before the lease, which is behind it, is in danger.
        with trio.fail_after(10):
            with pytest.raises(Unavailable):
                await store.request_cancel_unless_terminal(mine.saga_id)
            assert await store.renew_lease(WORKER, 60.0)
        await run_aio(other.close())
        assert await store.release_expired_workers() == 2


async def test_a_sweep_that_has_seen_old_rows_takes_nothing_from_a_living_worker(postgres_dsn: str) -> None:
    """Two workers sweep after a third has died: the first frees and claims, the second still sees the dead one's."""
    free_abandoned = load(Dialect.POSTGRES)["free_abandoned_sagas"]
    assert "FOR UPDATE SKIP LOCKED" in free_abandoned.text
    # Made to wait at a row, so that what it has seen is old when it comes to the next.
    waiting = free_abandoned.text.replace("SKIP LOCKED", "")
    async with open_loop(), open_postgres(postgres_dsn, events=True) as store, trio.open_nursery() as others:
        await store.register_worker(WORKER, 60.0)
        held, taken = await created(store, owner="gone"), await created(store, owner="gone")
        other, second = Link(postgres_dsn, {}), Link(postgres_dsn, {})
        await run_aio(other.exchange(partial(hold, held.saga_id)))
        others.start_soon(run_aio, second.exchange(lambda connection: connection.fetch(waiting)))
        await blocked_on_a_lock(postgres_dsn)
        assert await store.release_expired_workers() == 1
        (claimed,) = await store.claim_due_sagas(WORKER, 9)
        assert claimed.saga.saga_id == taken.saga_id
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        with trio.fail_after(20):
            while (saga := await store.get(held.saga_id)) is not None and saga.owner is not None:
                pass  # the second sweep has not come to its end
        assert await store.get(taken.saga_id) == claimed.saga
        for link in (other, second):
            await run_aio(link.close())


async def test_a_saga_that_is_given_to_another_while_a_lost_answer_is_made_good_stays_with_it(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READER_SESSION, "lock_timeout", "20000")  # until the machine has noticed that it waits

    async def give_away(connection: Any) -> None:
        await connection.execute("BEGIN")
        await connection.execute("UPDATE saga.saga_states SET owner = 'other', epoch = 2")

    async with open_loop(), open_postgres(postgres_dsn, events=True) as store, trio.open_nursery() as claiming:
        saga = await created(store, owner=WORKER)
        store._lost_claim_ids.update(str(row[0]) for row in ask(postgres_dsn, "SELECT claim_id FROM saga.saga_states"))
        other = Link(postgres_dsn, {})
        await run_aio(other.exchange(give_away))
        claiming.start_soon(store.claim_due_sagas, WORKER, 1)
        await blocked_on_a_lock(postgres_dsn)
        await run_aio(other.exchange(lambda connection: connection.execute("COMMIT")))
        await run_aio(other.close())
        assert await store.claim_due_sagas(WORKER, 1) == []  # after the other, on the same connection
        after = await store.get(saga.saga_id)
        assert after is not None
        assert (after.owner, after.epoch) == ("other", 2)


async def test_the_database_clock_rules_without_another(postgres_dsn: str) -> None:
    async with open_loop(), open_postgres(postgres_dsn, events=False) as store:
        await store.register_worker(WORKER, 0.0)
        assert not await store.renew_lease(WORKER, 15)
        saga = await running(store)
        saga = (await store.record(move(saga, attempt=2, retry_in_secs=-1, deadline_in_secs=100, release=True))).saga
        (claimed,) = await store.claim_due_sagas(WORKER, 1)
        assert claimed.deadline_in_secs == pytest.approx(100, abs=20)
        assert abs((claimed.saga.updated_at - claimed.saga.created_at).total_seconds()) < 20


# --- answers that never come ------------------------------------------------------------------------------------------


class Wire:
    """A TCP line to the server that can lose answers: the request gets through and is done, and nobody is told. Or
    keep them: everything stays open and nothing comes."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.loses_answers = False
        self.keeps_answers = False
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await nursery.start(
                partial(trio.serve_tcp, self._connect, 0, host="127.0.0.1", handler_nursery=nursery)
            )
            self.port = listener.socket.getsockname()[1]
            task_status.started()

    async def _connect(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._server_port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._forward, client, server, nursery)
            try:
                async for data in server:
                    if self.loses_answers:
                        break
                    if self.keeps_answers:
                        await trio.sleep_forever()
                    await client.send_all(data)
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()

    async def _forward(self, client: trio.SocketStream, server: trio.SocketStream, nursery: trio.Nursery) -> None:
        try:
            async for data in client:
                await server.send_all(data)
        except trio.BrokenResourceError:
            pass
        nursery.cancel_scope.cancel()


async def test_a_write_whose_answer_was_lost_is_known_when_it_is_sent_again(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery
) -> None:
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store:
        saga = await running(store)
        record = move(saga, current_step=1, logs=(log_entry(),), retry_in_secs=5)
        wire.loses_answers = True
        with pytest.raises(Unavailable):
            await store.record(record)
        new = new_saga(owner=WORKER)
        with pytest.raises(Unavailable):
            await store.create(new)
        wire.loses_answers = False
        assert (await store.record(record)).saga == await store.get(saga.saga_id)
        assert len(await store.step_logs(saga.saga_id)) == 1
        again = await store.create(new)
        assert again.saga.saga_id == new.saga_id
        assert await store.claim_due_sagas(WORKER, 10) == []
        assert await store.get(new.saga_id) == again.saga
    nursery.cancel_scope.cancel()


async def test_what_a_worker_was_given_by_an_answer_that_was_lost_comes_with_its_next_claim(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery
) -> None:
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store:
        known = await running(store)
        await store.claim_due_sagas(WORKER, 1)
        waiting = await created(store)
        wire.loses_answers = True
        with pytest.raises(Unavailable):
            await store.claim_due_sagas(WORKER, 1)
        born = new_saga(owner=WORKER)
        with pytest.raises(Unavailable):
            await store.create(born)
        wire.loses_answers = False
        owners = ask(postgres_dsn, "SELECT count(*) FROM saga.saga_states WHERE owner = $1", WORKER)
        assert owners == [(3,)]  # the database did all of it
        claimed = await store.claim_due_sagas(WORKER, 1)
        assert {one.saga.saga_id for one in claimed} == {waiting.saga_id, born.saga_id}
        assert {one.saga.epoch for one in claimed} == {2}
        assert await store.claim_due_sagas(WORKER, 1) == []
        assert await store.get(known.saga_id) == known
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("after_another", [False, True])
@pytest.mark.parametrize("name", ["renew_lease", "remove_worker"])
async def test_what_keeps_or_ends_a_lease_can_be_given_up_when_no_answer_comes(
    postgres_dsn: str, postgres_server: PostgresServer, nursery: trio.Nursery, name: str, after_another: bool
) -> None:
    """A worker must stop its sagas before its lease ends, and exit in time, also when the database only hangs."""
    wire = Wire(postgres_server.port)
    await nursery.start(wire.run)
    dsn = postgres_dsn.replace(str(postgres_server.port), str(wire.port))
    async with open_loop(), open_postgres(dsn, events=True) as store, trio.open_nursery() as others:
        await store.register_worker(WORKER, 60.0)
        wire.keeps_answers = True
        if after_another:
            others.start_soon(unanswered_claim, store)
            await trio.testing.wait_all_tasks_blocked(0.01)
        arguments = (WORKER, 60.0) if name == "renew_lease" else (WORKER,)
        with trio.fail_after(5), trio.move_on_after(0.1) as scope:
            await getattr(store, name)(*arguments)
        assert scope.cancelled_caught
        wire.keeps_answers = False
        nursery.cancel_scope.cancel()  # the claim ends with its line


async def unanswered_claim(store: PostgresStore) -> None:
    with pytest.raises(Unavailable):
        await store.claim_due_sagas(WORKER, 1)
