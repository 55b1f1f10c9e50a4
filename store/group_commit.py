"""Group commit: many writes, one transaction, without making a lone write wait.

A lane has one writer. While a batch is on its way to the database the next one gathers; nothing is ever held back on
purpose, so an idle lane adds no wait and a busy one fills its batches by itself. The lane knows nothing of SQL: it is
given a function that writes a batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import outcome
import trio

from saga.errors import RowRejected, Unavailable
from saga.meter import Meter

Row = TypeVar("Row")
Result = TypeVar("Result")

MAX_BATCH = 512
"""Rows in one transaction. From where a batch costs the database some 10 ms more gain little and only add latency;
the exact number is a guess."""

MAX_WAITING = 4096
"""Rows that may wait in a lane before callers are made to wait: eight batches, far above `max_concurrent`. A guess."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Row]):
    row: Row
    key: str
    task: trio.lowlevel.Task
    settled: bool = False


class Lane(Generic[Row, Result]):
    """One writer and what waits for it.

    `write_batch` writes rows as one transaction and answers for each, in order: a result, or the exception its caller
    is to get. It raises `RowRejected` when one row spoils the transaction and it cannot tell which (the lane then
    halves the batch until that row stands alone), and anything else when the whole batch failed.
    `key_of`: two rows of one key never share a batch, and keep their order.

    `batches`, `rows` and `busy_seconds` only grow; `rows / batches` is the mean batch. `meter` is told of each batch
    under the lane's `name`; whoever has one sets it.
    """

    def __init__(
        self,
        write_batch: Callable[[Sequence[Row]], Awaitable[Sequence[Result | Exception]]],
        *,
        key_of: Callable[[Row], str],
        max_batch: int = MAX_BATCH,
        max_waiting: int = MAX_WAITING,
        name: str = "writes",
    ) -> None:
        self.name = name
        self.meter = Meter()
        self._write_batch = write_batch
        self._key_of = key_of
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[Row]] = deque()
        self._room = trio.lowlevel.ParkingLot()
        self._arrival = trio.Event()
        self._closed = False
        self.batches = 0
        self.rows = 0
        self.busy_seconds = 0.0

    @property
    def waiting(self) -> int:
        """Rows that are in no batch yet."""
        return len(self._waiting)

    async def write(self, row: Row) -> Result:
        """The result of the row once its batch is durable.

        Cancelled before the row was queued: nothing is written. From then on a cancel waits for the outcome, so that
        there is one; it is delivered at the caller's next checkpoint. `Unavailable`: the lane is closed, or the
        database cannot be reached.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(self._waiting) >= self._max_waiting and not self._closed:
            await self._room.park()
        if self._closed:
            raise Unavailable("the store is closed")
        # No await between the check for room and the append: the bound holds.
        self._waiting.append(_Waiting(row, self._key_of(row), trio.lowlevel.current_task()))
        self._arrival.set()
        result: Result = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        return result

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Writes until `close` was called and nothing waits. A cancel does not stop it: callers stand behind every row,
        and `write_batch` bounds each batch in time."""
        try:
            with trio.CancelScope(shield=True):
                task_status.started()
                while True:
                    batch = self._take()
                    if batch:
                        started = time.perf_counter()
                        await self._write(batch)
                        self.busy_seconds += time.perf_counter() - started
                    elif self._closed:
                        return
                    else:
                        self._arrival = trio.Event()
                        await self._arrival.wait()
        finally:
            # Reached with callers waiting only if the writer itself broke: they must not wait for ever.
            self.close()
            while self._waiting:
                _settle(self._waiting.popleft(), outcome.Error(Unavailable("the store's writer has stopped")))

    def close(self) -> None:
        """Takes no more rows; what waits is still written."""
        self._closed = True
        self._arrival.set()
        self._room.unpark_all()

    def _take(self) -> list[_Waiting[Row]]:
        """The next batch, oldest first; a second row of a key stays for a later one."""
        batch: list[_Waiting[Row]] = []
        keys: set[str] = set()
        later: list[_Waiting[Row]] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if entry.key in keys:
                later.append(entry)
            else:
                keys.add(entry.key)
                batch.append(entry)
        self._waiting.extendleft(reversed(later))
        if batch:
            self._room.unpark(count=len(batch))
        return batch

    async def _write(self, batch: list[_Waiting[Row]]) -> None:
        started = time.perf_counter()
        try:
            results = await self._write_batch([entry.row for entry in batch])
            for entry, result in zip(batch, results, strict=True):
                _settle(entry, outcome.Error(result) if isinstance(result, Exception) else outcome.Value(result))
        except RowRejected as rejected:
            if len(batch) == 1:
                _settle(batch[0], outcome.Error(rejected))
            else:
                half = len(batch) // 2
                await self._write(batch[:half])
                await self._write(batch[half:])
        except Unavailable as error:
            self.meter.batch_failed(self.name)
            for entry in batch:
                # One exception a caller: a shared one would collect the tracebacks of all.
                own = Unavailable(error.told, error.reason)
                own.__cause__ = error
                _settle(entry, outcome.Error(own))
        except Exception as error:  # noqa: BLE001  a bug met by this batch: its callers get it, later batches go on
            for entry in batch:
                _settle(entry, outcome.Error(error))
        else:
            self.batches += 1
            self.rows += len(batch)
            self.meter.batch_written(self.name, len(batch), time.perf_counter() - started)
        finally:
            for entry in batch:  # of use only when something that is no Exception (KeyboardInterrupt) came through
                _settle(entry, outcome.Error(Unavailable("the store's writer has stopped")))


def _settle(entry: _Waiting[Row], result: outcome.Outcome[Result]) -> None:
    """Wakes the caller with the result; the first result stands."""
    if not entry.settled:
        entry.settled = True
        trio.lowlevel.reschedule(entry.task, result)
