"""Several workers on the same ports: `saga serve --workers N`.

The parent serves nothing. It holds the ports, forks the workers, starts anew what dies, and passes a stop on to all.
Each worker is a whole server (`app.serve`) over the one Postgres; the kernel deals connections out among them
(SO_REUSEPORT). What they do together they do through the store, as workers on different machines would.

The parent forks, and so runs no Trio and no thread: it waits in one place, for signals and for the pipes of its
workers, and everything it decides is in `Supervision.pass_once`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import msgspec

from server import app, logs
from server.checks import check
from server.config import Config, ConfigInvalid
from server.errors import CannotStart
from server.redaction import mask_of
from server.seat import Seat

log = logging.getLogger("saga.workers")

RESTART_SECS = (0.1, 30.0)
"""First and longest pause before a worker that died is started again. Short at first, since the others carry its load
and its sagas wait for its lease; long where it dies again and again."""

STEADY_SECS = 60.0
"""A worker that lived this long has not died of how it was started: its next pause is the first again. A guess."""

STOP_SECS = 30.0
"""How long beyond `saga.shutdown_grace_secs` a worker may take to end before it is killed. A drain is bounded by
itself; this is for one that hangs."""

EXIT_CANNOT_START = 3
"""How a worker says that a person has to mend something first."""

PR_SET_PDEATHSIG = 1

READY = b"r"
STOPS = (signal.SIGTERM, signal.SIGINT)


def serve_workers(config: Config, count: int) -> int:
    """Runs `count` workers until told to stop; the value is the exit status. `CannotStart`, `ConfigInvalid`."""
    check(config)
    if config.database is None:
        raise ConfigInvalid(
            (
                f"--workers {count}: the embedded store belongs to one process; "
                "add a `database` section or set DATABASE_URL, or leave --workers out",
            )
        )
    with ExitStack() as stack:
        host = config.server.host
        port = stack.enter_context(_held("server.port", host, config.server.port))
        grpc_port = stack.enter_context(_held("server.grpc_port", host, config.server.grpc_port))
        metrics_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saga-workers-")))
        server = msgspec.structs.replace(config.server, port=port, grpc_port=grpc_port)
        config = msgspec.structs.replace(config, server=server)

        def work(number: int, ready: Callable[[], None]) -> int:
            logs.configure(config.observability.log, mask_of(config), worker=number)
            seat = Seat(number=number, ready=ready, metrics_folder=metrics_folder)
            return app.serve(config, seat=seat)

        supervision = stack.enter_context(
            Supervision(count, work, kill_after_secs=config.saga.shutdown_grace_secs + STOP_SECS)
        )
        scheme = "http" if server.tls is None else "https"
        log.info("workers count=%d rest=%s://%s:%d grpc=%s:%d", count, scheme, host, port, host, grpc_port)
        while not supervision.over:
            supervision.pass_once()
        return supervision.exit_status


@contextmanager
def _held(key: str, host: str, port: int) -> Iterator[int]:
    """Holds an address without listening on it, so that it stays ours while workers come and go; the port it has.
    `CannotStart`: somebody else listens there, workers of another `saga serve` too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as held:
        try:
            with socket.socket(family) as probe:
                # Without SO_REUSEPORT, with which another installation could share the port unnoticed.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                probe.listen(1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((host, port))
        except OSError as error:
            reason = f"cannot listen on {host}:{port}: {error.strerror or error}"
            if error.errno == errno.EADDRINUSE:
                # Who restarts us does so at once after a kill, and would look for a stranger.
                reason += " (workers whose parent was killed hold it until they have drained)"
            raise CannotStart(f"{key}: {reason}") from error
        yield int(held.getsockname()[1])


@dataclass
class Worker:
    """One place among the workers, and the process that has it now. `pid` None: it ended; `start_at` says when the
    next one is due."""

    number: int
    pid: int | None = None
    pipe: int = -1
    started_at: float = 0.0
    start_at: float = 0.0
    pause_secs: float = RESTART_SECS[0]


class Supervision:
    """The workers of one parent. Entered, it owns the process's SIGTERM and SIGINT; left, no worker is alive."""

    def __init__(self, count: int, work: Callable[[int, Callable[[], None]], int], *, kill_after_secs: float) -> None:
        """`work(number, ready)` is what a worker does, in a process of its own; it returns the exit status."""
        self._work = work
        self._kill_after_secs = kill_after_secs
        self._workers = [Worker(number) for number in range(1, count + 1)]
        self._selector = selectors.DefaultSelector()
        self._undo = ExitStack()
        self._any_was_ready = False
        self._told_at: float | None = None
        self._kill_at = float("inf")
        self.exit_status = 0

    def __enter__(self) -> Supervision:
        told, tell = socket.socketpair()
        for end in (told, tell):
            end.setblocking(False)
            self._undo.callback(end.close)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(tell.fileno()))
        for number in STOPS:
            # The byte in the wakeup socket is what is acted on; the handler is only there so that one is written.
            self._undo.callback(signal.signal, number, signal.signal(number, _noted))
        self._selector.register(told, selectors.EVENT_READ, None)
        self._told = told
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.pid is not None:
                os.kill(worker.pid, signal.SIGKILL)
                self._reap(worker)
        self._selector.close()
        self._undo.close()

    @property
    def over(self) -> bool:
        """Told to stop, or with nothing to gain from going on, and every worker has ended."""
        return self._told_at is not None and all(worker.pid is None for worker in self._workers)

    def pass_once(self) -> None:
        """Starts who is due, then waits for the next thing to happen and deals with it."""
        now = time.monotonic()
        if self._told_at is None:
            for worker in self._workers:
                if worker.pid is None and now >= worker.start_at:
                    self._start(worker)
            due = [worker.start_at for worker in self._workers if worker.pid is None]
        else:
            due = [self._kill_at]
            if now >= self._kill_at:
                self._kill()
        soonest = min(due, default=float("inf"))
        timeout_secs = None if soonest == float("inf") else max(0.0, soonest - time.monotonic())
        for key, _ in self._selector.select(timeout_secs):
            if key.data is None:
                self._signalled()
            else:
                self._heard(key.data)

    def _start(self, worker: Worker) -> None:
        ours, theirs = os.pipe()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        # A stop that comes just now must not be met by a child that still has our handlers, and be forgotten there.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        pid = os.fork()
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        else:
            os._exit(self._live(worker.number, parent, theirs))
        os.close(theirs)  # so that its end is the end of the pipe
        worker.pid, worker.pipe, worker.started_at = pid, ours, time.monotonic()
        self._selector.register(ours, selectors.EVENT_READ, worker)
        log.info("worker_started worker=%d pid=%d", worker.number, pid)

    def _live(self, number: int, parent: int, pipe: int) -> int:
        """A worker's whole life, in its own process; the exit status."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # A Ctrl-C reaches the parent alone, which passes it on once; one that came before is forgotten here.
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            die_with(parent)
            self._selector.close()
            for worker in self._workers:
                if worker.pid is not None:
                    os.close(worker.pipe)
            return self._work(number, partial(_say_ready, pipe))
        except (ConfigInvalid, CannotStart) as error:
            logs.tell_why_not(str(error), f"saga: worker {number}")
            return EXIT_CANNOT_START
        except BaseException:  # nothing may get past into the parent's code, of which this is a copy
            log.exception("worker_crashed")
            return 1
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            logs.flush()

    def _heard(self, worker: Worker) -> None:
        if os.read(worker.pipe, 1) == READY:
            self._any_was_ready = True
            return
        lived = time.monotonic() - worker.started_at
        pid, status = worker.pid, self._reap(worker)
        if self._told_at is not None:
            log.info("worker_ended worker=%d pid=%s status=%d", worker.number, pid, status)
            if status not in (0, -signal.SIGTERM):  # killed by it: told before it had begun with anything
                self.exit_status = 1
        elif status == EXIT_CANNOT_START and not self._any_was_ready:
            self.exit_status = 1
            self._stop()
        else:
            first, longest = RESTART_SECS
            pause_secs = first if lived >= STEADY_SECS else worker.pause_secs
            worker.start_at = time.monotonic() + pause_secs
            worker.pause_secs = min(2 * pause_secs, longest)
            log.error(
                "worker_died worker=%d pid=%s status=%d restart_in_secs=%.1f", worker.number, pid, status, pause_secs
            )

    def _reap(self, worker: Worker) -> int:
        """The status of a worker that has ended, or is ending: negative, the signal that killed it."""
        assert worker.pid is not None  # only called for a worker that was started and not reaped
        self._selector.unregister(worker.pipe)
        os.close(worker.pipe)
        _, status = os.waitpid(worker.pid, 0)
        worker.pid = None
        return os.waitstatus_to_exitcode(status)

    def _signalled(self) -> None:
        with suppress(BlockingIOError):
            self._told.recv(64)
        if self._told_at is None:
            log.info("stopping workers=%d", len(self._workers))
            self._stop()
        elif time.monotonic() - self._told_at >= app.SECOND_SIGNAL_SECS:
            self._pass_on(signal.SIGTERM)

    def _stop(self) -> None:
        self._told_at = time.monotonic()
        self._kill_at = self._told_at + self._kill_after_secs
        self._pass_on(signal.SIGTERM)

    def _kill(self) -> None:
        log.error("workers_killed reason=%s", "they did not end")
        self._kill_at = float("inf")
        self._pass_on(signal.SIGKILL)

    def _pass_on(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if worker.pid is not None:
                os.kill(worker.pid, number)  # not reaped yet, so the number is still its own


def _say_ready(pipe: int) -> None:
    with suppress(BrokenPipeError):  # the parent has just died, and our SIGTERM is on its way
        os.write(pipe, READY)


def _noted(_number: int, _frame: FrameType | None) -> None:
    pass


def die_with(parent: int) -> None:
    """Has this process told to stop (SIGTERM: a drain) when its parent ends, however it ends. Linux only; elsewhere
    workers outlive a parent that was killed."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), errno.errorcode.get(ctypes.get_errno(), "prctl"))
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)
