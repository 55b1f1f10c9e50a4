"""`server.tls`: both doors speak TLS with real clients; certificates change under way; wrong files are named."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from rpc.settings import ServiceSettings, ServiceTls
from server.checks import check
from server.config import (
    ClientAuth,
    Config,
    ConfigInvalid,
    DatabaseConfig,
    KafkaConfig,
    KafkaTls,
    ServerConfig,
    ServerTls,
)
from server.tls import ServerContexts, TlsFilesInvalid, file_problems
from tests.support.certificates import Certificate, certificate, client_context
from tests.support.issuer import issuer, token_of
from tests.support.server_process import ServerProcess, server_process

ROOT = Path(__file__).parents[2]
SECS = 30.0

GRPCIO = r"""
import sys
import grpc
from k1s0.system.saga.v1 import saga_pb2 as pb
port, ca_file, cert_file, key_file = sys.argv[1:]
token = sys.stdin.read()
read = lambda name: open(name, "rb").read() if name else None
credentials = grpc.ssl_channel_credentials(read(ca_file), read(key_file), read(cert_file))
channel = grpc.secure_channel(f"localhost:{port}", credentials)
call = channel.unary_unary("/k1s0.system.saga.v1.SagaService/ListWorkflows",
    request_serializer=pb.ListWorkflowsRequest.SerializeToString,
    response_deserializer=pb.ListWorkflowsResponse.FromString)
try:
    metadata = [("x-request-id", "r-7")] + [("authorization", "Bearer " + token)] * bool(token)
    _, told = call.with_call(pb.ListWorkflowsRequest(), metadata=metadata, timeout=20)
    print("OK", dict(told.initial_metadata())["x-request-id"])
except grpc.RpcError as error:
    print(error.code().name)
"""


def by_grpcio(port: int, ca_file: str, shown: Certificate | None = None, bearer: str = "") -> str:
    pair = ("", "") if shown is None else (shown.cert_file, shown.key_file)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    done = subprocess.run(
        [sys.executable, "-c", GRPCIO, str(port), ca_file, *pair],
        input=bearer,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "GRPC_VERBOSITY": "NONE"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def peer_of(
    port: int, ca_file: str, *protocols: str, shown: Certificate | None = None
) -> tuple[str, str | None, bytes]:
    """TLS version, protocol agreed on, and certificate of whoever listens there."""
    context = client_context(ca_file, *protocols, shown=shown)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=SECS) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as stream,
    ):
        version, peer = stream.version(), stream.getpeercert(binary_form=True)
        assert version is not None
        assert peer is not None
        return version, stream.selected_alpn_protocol(), peer


def until(holds: Callable[[], bool], server: ServerProcess) -> None:
    give_up_at = time.monotonic() + SECS
    while not holds():
        assert server.process.poll() is None, server.log
        assert time.monotonic() < give_up_at, server.log
        time.sleep(0.02)  # a process of its own: nothing to wait on but what it shows


def configure(server: ServerProcess, tls: dict[str, Any]) -> None:
    config = json.loads(server.config.read_text())
    config["server"]["tls"] = tls
    server.config.write_text(json.dumps(config))


def pair(made: Certificate) -> dict[str, Any]:
    return {"cert_file": made.cert_file, "key_file": made.key_file}


def test_both_doors_speak_tls_with_real_clients_and_new_files_are_shown_to_new_connections(tmp_path: Path) -> None:
    made, bearer = certificate(tmp_path), token_of("sys_auditor")
    with issuer() as idp, server_process(tmp_path, {"auth": idp.settings()}) as server:
        configure(server, pair(made))
        server.spawn()
        until(lambda: " ready " in server.log or '"ready"' in server.log, server)
        assert f"rest=https://127.0.0.1:{server.port} grpc=127.0.0.1:{server.grpc_port} tls=true" in server.log
        until(lambda: "jwks_loaded" in server.log, server)
        assert by_grpcio(server.grpc_port, made.ca_file, bearer=bearer) == "OK r-7"
        assert by_grpcio(server.grpc_port, made.ca_file) == "UNAUTHENTICATED"
        stranger = certificate(tmp_path, by="other", called="stranger")
        assert by_grpcio(server.grpc_port, stranger.ca_file, bearer=bearer) == "UNAVAILABLE"
        assert peer_of(server.port, made.ca_file, "h2", "http/1.1")[1] == "h2"
        assert peer_of(server.port, made.ca_file, "http/1.1")[1] == "http/1.1"
        assert peer_of(server.port, made.ca_file)[1] is None
        assert peer_of(server.grpc_port, made.ca_file, "h2", "http/1.1")[1] == "h2"
        ports = (server.port, server.grpc_port)
        if curl := which("curl"):
            url = f"https://localhost:{server.port}/api/v1/sagas"
            for version in ("--http1.1", "--http2"):
                command = [curl, "-s", version, "--cacert", made.ca_file, url]
                done = subprocess.run(command, capture_output=True, check=True)
                assert json.loads(done.stdout)["error"]["code"] == "SYS_AUTH_MISSING_TOKEN"
                shown = [*command, "-H", f"Authorization: Bearer {bearer}"]
                done = subprocess.run(shown, capture_output=True, check=True)
                assert json.loads(done.stdout)["sagas"] == []
        if openssl := which("openssl"):
            for port in ports:
                command = [openssl, "s_client", "-connect", f"127.0.0.1:{port}", "-CAfile", made.ca_file]
                done = subprocess.run([*command, "-alpn", "h2"], capture_output=True, check=False, input=b"")
                assert b"Verify return code: 0 (ok)" in done.stdout
                assert b"ALPN protocol: h2" in done.stdout
                # Without the level this client would not even offer it.
                offer = [*command, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
                old = subprocess.run(offer, capture_output=True, check=False, input=b"")
                assert old.returncode != 0
                assert b"Cipher is (NONE)" in old.stdout

        with urllib.request.urlopen(
            f"https://127.0.0.1:{server.port}/metrics", timeout=SECS, context=client_context(made.ca_file)
        ) as answer:
            told = re.search(
                r'saga_tls_certificate_expiry_timestamp_seconds{use="server"} (\S+)', answer.read().decode()
            )
        assert told is not None
        assert float(told[1]) == pytest.approx(time.time() + 10 * 24 * 3600, abs=600)

        before = {peer_of(port, made.ca_file)[2] for port in ports}
        assert len(before) == 1
        Path(made.key_file).write_text("broken")
        until(lambda: "tls_files_unusable" in server.log, server)
        assert {peer_of(port, made.ca_file)[2] for port in ports} == before
        certificate(tmp_path)
        until(lambda: all(peer_of(port, made.ca_file)[2] not in before for port in ports), server)
        assert by_grpcio(server.grpc_port, made.ca_file, bearer=bearer) == "OK r-7"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.log


def test_workers_on_the_same_ports_show_the_certificate_and_want_one(tmp_path: Path, postgres_dsn: str) -> None:
    made, client = certificate(tmp_path), certificate(tmp_path, "client", called="client")
    with server_process(tmp_path, {}, "--workers", "2", env={"DATABASE_URL": postgres_dsn}) as server:
        configure(server, {**pair(made), "client_ca_file": made.ca_file})
        server.spawn()
        until(lambda: server.log.count("ready") >= 2, server)
        for _ in range(5):
            assert peer_of(server.port, made.ca_file, shown=client)[0] == "TLSv1.3"
        assert by_grpcio(server.grpc_port, made.ca_file, client) == "OK r-7"
        assert by_grpcio(server.grpc_port, made.ca_file) == "UNAVAILABLE"
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.log


def shaken(context: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """The server's side of a handshake in memory; `ssl.SSLError`: it does not take the client."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    other = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (other, server, other, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    return server


@pytest.mark.parametrize("mode", list(ClientAuth))
@pytest.mark.parametrize("shows", ["ours", "none", "a stranger's", "an expired one"])
def test_a_client_certificate_is_asked_for_as_configured(tmp_path: Path, mode: ClientAuth, shows: str) -> None:
    made = certificate(tmp_path)
    settings = ServerTls(
        cert_file=made.cert_file, key_file=made.key_file, client_ca_file=made.ca_file, client_auth=mode
    )
    shown = None
    if shows != "none":
        by = "other" if shows == "a stranger's" else "trusted"
        shown = certificate(tmp_path, "client", by=by, expired=shows == "an expired one", called="client")
    client = client_context(made.ca_file, shown=shown)
    contexts = ServerContexts(settings)
    for context in (contexts.rest(), contexts.grpc()):
        if shows == "ours" or (shows == "none" and mode is ClientAuth.OPTIONAL):
            assert (shaken(context, client).getpeercert() is not None) is (shows == "ours")
        else:
            with pytest.raises(ssl.SSLError):
                shaken(context, client)


def test_clients_of_an_authority_that_is_no_longer_listed_are_refused_from_the_next_connection_on(
    tmp_path: Path,
) -> None:
    made, client = certificate(tmp_path), certificate(tmp_path, "client", called="client")
    listed = tmp_path / "clients-ca.pem"
    listed.write_bytes(Path(client.ca_file).read_bytes())
    contexts = ServerContexts(ServerTls(cert_file=made.cert_file, key_file=made.key_file, client_ca_file=str(listed)))
    showing = client_context(made.ca_file, shown=client)
    assert shaken(contexts.grpc(), showing).getpeercert() is not None
    listed.write_bytes(Path(certificate(tmp_path, by="other", called="other").ca_file).read_bytes())
    assert contexts.reload_if_changed()
    for context in (contexts.rest(), contexts.grpc()):
        with pytest.raises(ssl.SSLError):
            shaken(context, showing)
    # Half a file is no reason to let anybody in, or to keep the doors shut.
    listed.write_bytes(listed.read_bytes()[:200])
    assert not contexts.reload_if_changed()
    with pytest.raises(ssl.SSLError):
        shaken(contexts.rest(), showing)


def test_files_are_read_anew_when_they_change_and_bad_ones_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = certificate(tmp_path)
    contexts = ServerContexts(ServerTls(cert_file=made.cert_file, key_file=made.key_file))
    first = contexts.rest(), contexts.grpc()
    assert not contexts.reload_if_changed()
    another = certificate(tmp_path, called="another")
    # Certificate first, key later: the moment between is no change.
    os.replace(another.cert_file, made.cert_file)
    assert not contexts.reload_if_changed()
    assert (contexts.rest(), contexts.grpc()) == first
    assert f"server.tls.key_file: {made.key_file}: is not the key of the certificate" in caplog.text
    caplog.clear()
    assert not contexts.reload_if_changed()
    assert caplog.text == ""  # told once
    os.replace(another.key_file, made.key_file)
    assert contexts.reload_if_changed()
    assert contexts.rest() is not first[0]
    assert contexts.grpc() is not first[1]
    Path(made.cert_file).unlink()
    assert not contexts.reload_if_changed()
    assert f"server.tls.cert_file: {made.cert_file}: cannot be read: No such file or directory" in caplog.text


def problem(tls: ServerTls) -> str:
    (line,) = file_problems(Config(server=ServerConfig(tls=tls)))
    with pytest.raises(TlsFilesInvalid):
        ServerContexts(tls)
    return line


def test_a_file_that_cannot_be_used_is_named_with_its_key_and_what_was_expected(tmp_path: Path) -> None:
    made, other = certificate(tmp_path), certificate(tmp_path, called="other")
    text, encrypted, cut = (str(tmp_path / name) for name in ("text", "encrypted.pem", "cut.pem"))
    Path(text).write_text("no certificate\n")
    Path(cut).write_bytes(Path(made.cert_file).read_bytes()[:300])
    key = load_pem_private_key(Path(made.key_file).read_bytes(), None)
    Path(encrypted).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")))

    def told(cert_file: str = made.cert_file, key_file: str = made.key_file, client_ca_file: str | None = None) -> str:
        return problem(ServerTls(cert_file=cert_file, key_file=key_file, client_ca_file=client_ca_file))

    nowhere = str(tmp_path / "nowhere.pem")
    assert told(cert_file=nowhere).startswith(
        f"server.tls.cert_file: {nowhere}: cannot be read: No such file or directory; expected a PEM file with a certif"
    )
    assert "Is a directory" in told(key_file=str(tmp_path))
    assert told(cert_file=text).startswith(f"server.tls.cert_file: {text}: expected a PEM file with a certificate")
    assert told(key_file=text) == f"server.tls.key_file: {text}: expected a PEM file with a private key"
    assert told(key_file=other.key_file) == (
        f"server.tls.key_file: {other.key_file}: is not the key of the certificate in {made.cert_file}"
    )
    assert told(key_file=encrypted) == (
        f"server.tls.key_file: {encrypted}: the key is encrypted; expected one without a passphrase"
    )
    assert told(cert_file=cut).startswith(f"server.tls.cert_file: {cut}, {made.key_file}: expected a certificate and")
    assert told(client_ca_file=text) == f"server.tls.client_ca_file: {text}: expected a PEM file of certificates"
    assert told(client_ca_file=cut).startswith(f"server.tls.client_ca_file: {cut}: expected a PEM file of certificates")


def test_the_files_of_every_section_are_looked_at(tmp_path: Path) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    config = Config(
        services={"shop": ServiceSettings(host="h", port=1, tls=ServiceTls(ca_file=a, cert_file=b, key_file=c))},
        database=DatabaseConfig(name="n", user="u", ssl_root_cert=a, ssl_cert=b, ssl_key=c),
        kafka=KafkaConfig(brokers=("k:1",), tls=KafkaTls(ca_file=a, cert_file=b, key_file=c)),
    )
    assert [line.split(": cannot be read")[0] for line in file_problems(config)] == [
        f"{section}.{key}: {file}"
        for section, keys in (
            ("services.shop.tls", ("ca_file", "cert_file", "key_file")),
            ("database", ("ssl_root_cert", "ssl_cert", "ssl_key")),
            ("kafka.tls", ("ca_file", "cert_file", "key_file")),
        )
        for key, file in zip(keys, (a, b, c), strict=True)
    ]


def test_a_certificate_outside_its_time_is_shown_if_there_is_no_other_but_replaces_no_good_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = certificate(tmp_path, expired=True)
    contexts = ServerContexts(ServerTls(cert_file=made.cert_file, key_file=made.key_file))
    certificate(tmp_path, begins_in=timedelta(days=1))
    assert contexts.reload_if_changed()  # neither is good
    certificate(tmp_path)
    assert contexts.reload_if_changed()
    good, shown = (contexts.rest(), contexts.grpc()), contexts.shown
    for bad, told in (
        ({"expired": True}, "expired at "),
        ({"begins_in": timedelta(days=1)}, "not valid before "),
    ):
        certificate(tmp_path, **bad)
        caplog.clear()
        assert not contexts.reload_if_changed()
        assert not contexts.reload_if_changed()
        assert (contexts.rest(), contexts.grpc(), contexts.shown) == (*good, shown)
        (line,) = caplog.messages
        assert line.startswith("tls_files_unusable in_use=the certificate of before")
        assert f"error=server.tls.cert_file: {made.cert_file}: {told}" in line
    certificate(tmp_path)
    assert contexts.reload_if_changed()


def test_a_certificate_that_came_too_early_is_shown_once_its_time_has_come(tmp_path: Path) -> None:
    made, at = certificate(tmp_path), datetime.now(UTC)
    contexts = ServerContexts(ServerTls(cert_file=made.cert_file, key_file=made.key_file), now=lambda: at)
    before = contexts.rest()
    certificate(tmp_path, begins_in=timedelta(hours=1))
    assert not contexts.reload_if_changed()
    at += timedelta(hours=2)
    assert contexts.reload_if_changed()
    assert contexts.rest() is not before


def test_a_start_with_files_that_are_not_there_is_refused_with_all_of_them() -> None:
    service = ServiceSettings(host="localhost", port=1, tls=ServiceTls(ca_file="/nowhere/ca.pem"))
    tls = ServerTls(cert_file="/nowhere/cert.pem", key_file="/nowhere/key.pem")
    with pytest.raises(ConfigInvalid) as caught:
        check(Config(server=ServerConfig(tls=tls), services={"shop": service}))
    assert [line.split(": /nowhere")[0] for line in caught.value.problems] == [
        "server.tls.cert_file",
        "server.tls.key_file",
        "services.shop.tls.ca_file",
    ]


def test_tls_does_not_open_the_server_to_others_without_tokens(tmp_path: Path) -> None:
    made = certificate(tmp_path, "client")
    tls = ServerTls(cert_file=made.cert_file, key_file=made.key_file, client_ca_file=made.ca_file)
    with pytest.raises(ConfigInvalid, match=r"server\.host: expected a loopback address"):
        check(Config(server=ServerConfig(host="0.0.0.0", tls=tls)))
