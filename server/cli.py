"""The command line: `saga serve`, `health`, `workflow check`, `migrate`, `demo`, `--version`.

Each command is one function that returns the exit status; what it needs is imported inside it, so that checking a file
does not load a server. Errors a person can mend are printed without a traceback and exit with 1 (2: wrong usage).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from server.version import product_version

if TYPE_CHECKING:
    from store.migrations import MigrationStatus

MAX_WORKERS = 256
"""A bound against a slip of the keyboard; each worker has connections of its own to the database."""

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the value is the process's exit status."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:
        # The reader of our output is gone (`saga ... | head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saga", description="Runs sagas: steps across services, each with its undo.")
    parser.add_argument("--version", action="version", version=f"saga {product_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the server: REST, gRPC and the engine")
    _add_config(serve)
    serve.add_argument(
        "--insecure",
        action="store_true",
        help="without an `auth` section, listen on other than loopback addresses too, and answer under any name",
    )
    serve.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="N processes on the same ports (needs PostgreSQL)"
    )
    serve.set_defaults(command=_serve)

    health = commands.add_parser("health", help="ask the server of this configuration whether it is alive; 0: it is")
    health.add_argument(
        "--ready", action="store_true", help="whether it is ready, which it is not without its database"
    )
    health.add_argument("--json", action="store_true", help="print JSON")
    _add_config(health)
    health.set_defaults(command=_health)

    workflow = commands.add_parser("workflow", help="work with workflow definitions")
    check = workflow.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check", help="check workflow files; prints file:line:col: path: message for every error"
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="or a folder, whose .yaml and .yml it takes")
    check.add_argument("--json", action="store_true", help="print the errors as JSON, [] if there is none")
    check.set_defaults(command=_workflow_check)

    migrate = commands.add_parser("migrate", help="bring the database's schema up or down, or show where it stands")
    migrate.add_argument("direction", choices=["up", "down", "status"])
    migrate.add_argument("--to", type=int, metavar="N", help="down: stop when migration N is the newest applied")
    migrate.add_argument("--yes", action="store_true", help="down: yes, with all data in what is taken back")
    migrate.add_argument("--json", action="store_true", help="status: print JSON")
    _add_config(migrate)
    migrate.set_defaults(command=_migrate)

    demo = commands.add_parser("demo", help="run three orders against three sample services, with nothing to set up")
    demo.add_argument(
        "--once", action="store_true", help="exit when the orders have ended, 1 if one did not as it should"
    )
    demo.add_argument("--json", action="store_true", help="with --once: print what happened as JSON")
    demo.set_defaults(command=_demo)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="default: $CONFIG_PATH, else config/config.yaml if it is there"
    )


def _count(text: str) -> int:
    """argparse's type of a number of processes."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_WORKERS}, got {text}")
    return int(text)


def _fail(message: str) -> int:
    for line in message.splitlines():
        print(f"saga: {line}", file=sys.stderr)
    return 1


def _serve(arguments: argparse.Namespace) -> int:
    import msgspec

    from server import app, logs
    from server.config import ConfigInvalid
    from server.config_loading import config_file, load_config
    from server.errors import CannotStart
    from server.redaction import mask_of
    from server.workers import serve_workers

    try:
        config = load_config(arguments.config, os.environ)
        config = msgspec.structs.replace(config, insecure=arguments.insecure)
        logs.configure(config.observability.log, mask_of(config))
        app.tell_beginnings(config, config_file(arguments.config, os.environ), arguments.workers)
        if arguments.workers > 1:
            return serve_workers(config, arguments.workers)
        return app.serve(config)
    except (ConfigInvalid, CannotStart) as error:
        logs.tell_why_not(str(error))
        return 1


def _health(arguments: argparse.Namespace) -> int:
    import msgspec

    from server.config import ConfigInvalid
    from server.config_loading import load_config
    from server.health import ask

    try:
        health = ask(load_config(arguments.config, os.environ).server, ready=arguments.ready)
    except ConfigInvalid as error:
        return _fail(str(error))
    if arguments.json:
        print(json.dumps(msgspec.structs.asdict(health)))
    elif health.healthy:
        print(f"{health.url}: {health.told}")
    else:
        _fail(f"{health.url}: {health.told}")
    return 0 if health.healthy else 1


def _workflow_check(arguments: argparse.Namespace) -> int:
    import msgspec

    from saga.workflow_files import check_files

    faults = check_files(arguments.files)
    if arguments.json:
        print(json.dumps([{"file": str(fault.file), **msgspec.structs.asdict(fault.detail)} for fault in faults]))
    else:
        for fault in faults:
            print(fault)
    return 1 if faults else 0


def _migrate(arguments: argparse.Namespace) -> int:
    from server.config import ConfigInvalid
    from server.config_loading import load_config
    from server.errors import CannotStart
    from server.schema import migrate

    if arguments.to is not None and arguments.direction != "down":
        return _fail("--to goes with `migrate down`")
    if arguments.direction == "down" and not arguments.yes:
        return _fail("`migrate down` deletes what is stored in the tables and columns it takes back; add --yes")
    try:
        rows = migrate(load_config(arguments.config, os.environ), arguments.direction, arguments.to)
    except (ConfigInvalid, CannotStart) as error:
        return _fail(str(error))
    if arguments.json:
        print(json.dumps([{"number": row.number, "name": row.name, "applied_at": _instant(row)} for row in rows]))
        return 0
    for row in rows:
        print(f"{row.number:03d}  {row.name:<24}  {_instant(row) or 'not applied'}")
    return 0


def _instant(row: MigrationStatus) -> str | None:
    return row.applied_at.isoformat(timespec="seconds") if row.applied_at else None


def _demo(arguments: argparse.Namespace) -> int:
    from demo import run

    return run.main(once=arguments.once, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
