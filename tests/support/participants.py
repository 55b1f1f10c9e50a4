"""Scripted participants: real gRPC servers in processes of their own, which do as told and write down every call.

    with participant(flavour="grpcio") as shop:
        shop.script({"Reserve": [{"status": "UNAVAILABLE", "times": 2}, {"answer": {"receipt_id": "r-1"}}]})
        ...                                # call it at shop.settings() or shop.port
        assert [call.metadata["saga-attempt"] for call in shop.calls("Reserve")] == ["1", "2", "3"]
        assert shop.effects() == {"saga-1:0:execute": 1}

The services and messages are those of `shop.proto`. A method that the script does not name answers `{"ok": true}`.
The journal is a file of JSON lines, written before the call is answered, so it survives `kill()` of the participant
and of the orchestrator; `restart()` goes on with the same port, journal and script.

A script is a mapping from method name (`Reserve`, or `*` for the rest) to a list of behaviours. The first one that is
not used up serves the call; the last is for ever.

    {"answer": {...}}            fields of the Receipt (any JSON object where codec is json)
    {"status": "ABORTED", "message": "…", "retry_after_secs": 1.5}
    {"hang": true}               answers never; notes "cancelled" when the caller gives up
    {"delay_secs": 0.2}          beside any other key: waits first
    {"die": "before" | "after"}  kills its own process (SIGKILL) before or after the effect is noted, without an answer
    {"kill": pid, "at": "before" | "after"}  kills that process (SIGKILL), and does what else it says
    {"raw": "<base64>"}          these bytes as the message
    {"times": n}                 beside any other key: only for n calls (the count survives `restart()`)
    {"every": n}                 beside any other key: only for every n-th call of the participant
    {"once": true}               beside any other key: a good participant; the work of an idempotency key is done once,
                                 however often it is asked for (also across `restart()`)
    {"effect": true}             beside "status", "hang" or "raw": the effect is noted although no success is told
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import trio

from tests.support.certificates import Certificate

ROOT = Path(__file__).parents[2]

Flavour = Literal["grpcio", "grpclib"]
Codec = Literal["protobuf", "json"]
Script = Mapping[str, Sequence[Mapping[str, Any]]]


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call as the participant saw it. `timeout_secs`: what was left of its deadline on arrival.

    `effect`: the work was done. `ended`: "answered", "cancelled" (the caller gave up) or None (still running, or the
    process died).
    """

    call_id: str
    service: str
    method: str
    metadata: dict[str, str]
    request: dict[str, Any]
    timeout_secs: float | None = None
    effect: bool = False
    ended: str | None = None


@functools.cache
def compiled(*protos: str) -> bytes:
    """The descriptor set of these files of `tests/support`, imports included."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.bin"
        well_known = Path(protoc.__file__).parent / "_proto"
        command = ["protoc", f"-I{ROOT}", f"-I{well_known}", "--include_imports", f"--descriptor_set_out={out}"]
        assert protoc.main([*command, *(f"tests/support/{proto}" for proto in protos)]) == 0
        return out.read_bytes()


class Participant:
    """A running participant; made by `participant`."""

    def __init__(
        self,
        folder: Path,
        flavour: Flavour,
        codec: Codec,
        reflection: bool,
        ambiguous: bool,
        max_streams: int,
        certificate: Certificate | None,
        client_ca_file: str | None,
    ) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self.codec: Codec = codec
        self.journal = folder / "journal.jsonl"
        self.descriptor_set = folder / "set.bin"
        self._script = folder / "script.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._options = ["--flavour", flavour, "--codec", codec, "--max-streams", str(max_streams)]
        if reflection:
            self._options.append("--reflection")
        if certificate is not None:
            self._options += ["--tls-cert", certificate.cert_file, "--tls-key", certificate.key_file]
        if client_ca_file is not None:
            self._options += ["--tls-client-ca", client_ca_file]
        self._scripts = itertools.count()
        self.journal.touch()
        self.descriptor_set.write_bytes(compiled("shop.proto", *(["shop_v2.proto"] if ambiguous else [])))
        self.script({})

    def script(self, script: Script) -> None:
        """What to do from the next call on; the counts of `times` begin anew."""
        partial = self._script.with_suffix(".new")
        partial.write_text(json.dumps({"number": next(self._scripts), "methods": script}))
        partial.rename(self._script)

    def start(self) -> None:
        """Starts the process, on the port it had before if it had one; returns when it listens."""
        command = [sys.executable, "-m", "tests.support.participant_server", *self._options]
        command += ["--port", str(self.port), "--journal", str(self.journal)]
        command += ["--script", str(self._script), "--descriptor-set", str(self.descriptor_set)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the participant did not start"
        self.port = int(line)
        fcntl.fcntl(self._process.stdout, fcntl.F_SETFL, os.O_NONBLOCK)

    def kill(self) -> None:
        """SIGKILL: connections break, nothing is said."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def offer_more(self) -> None:
        """From the next start on it has a second service named Inventory, in `shop.v2`."""
        self.descriptor_set.write_bytes(compiled("shop.proto", "shop_v2.proto"))

    def stop_gracefully(self) -> None:
        """SIGTERM: takes no new calls, tells its clients (GOAWAY), finishes the calls it has, ends."""
        self._signal(signal.SIGTERM)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered, not even a ping."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def settings(self) -> dict[str, Any]:
        """What the `services` section of the configuration says of it."""
        return {"host": self.host, "port": self.port, "codec": self.codec}

    def calls(self, method: str | None = None) -> list[Call]:
        """Every call so far, in the order of arrival; of one method if named."""
        calls: dict[str, dict[str, Any]] = {}
        for line in self.journal.read_text().splitlines():
            entry = json.loads(line)
            if "script" in entry:
                continue
            calls.setdefault(entry["call_id"], {}).update(entry)
        seen = [msgspec.convert(call, Call) for call in calls.values()]
        return [call for call in seen if method is None or call.method == method]

    def effects(self) -> Counter[str]:
        """How often the work was done for each idempotency key."""
        return Counter(call.metadata.get("idempotency-key", "") for call in self.calls() if call.effect)

    async def until(self, count: int, method: str | None = None, *, ended: str | None = None) -> list[Call]:
        """Waits (Trio) until `count` calls have arrived, or, with `ended`, have ended so; returns them. Fails after
        10 s."""
        assert self._process is not None
        assert self._process.stdout is not None
        out = self._process.stdout
        with trio.fail_after(10):
            while True:
                calls = [call for call in self.calls(method) if ended is None or call.ended == ended]
                if len(calls) >= count:
                    return calls
                # The participant writes a byte for each line of its journal.
                await trio.lowlevel.wait_readable(out)
                assert os.read(out.fileno(), 65536), "the participant has ended"


@contextmanager
def participant(
    flavour: Flavour = "grpcio",
    *,
    codec: Codec = "protobuf",
    reflection: bool = True,
    ambiguous: bool = False,
    max_streams: int = 0,
    certificate: Certificate | None = None,
    client_ca_file: str | None = None,
    script: Script | None = None,
) -> Iterator[Participant]:
    """A participant that listens while the block runs. `ambiguous`: it has a second service named Inventory.
    `max_streams`: how many calls it takes at once on a connection (grpcio only; 0: no limit).
    `certificate`: it speaks TLS; with `client_ca_file` it wants certificates signed by that authority."""
    with tempfile.TemporaryDirectory(prefix="participant-") as folder:
        made = Participant(
            Path(folder), flavour, codec, reflection, ambiguous, max_streams, certificate, client_ca_file
        )
        if script is not None:
            made.script(script)
        made.start()
        try:
            yield made
        finally:
            made.kill()
