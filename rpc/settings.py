"""What the operator says about a participant: the `services` section of the configuration, as `rpc/` needs it."""

from __future__ import annotations

from typing import Literal

import msgspec


class ServiceTls(msgspec.Struct, frozen=True, kw_only=True):
    """TLS towards a participant. All are paths of PEM files except `server_name`, the name its certificate must carry
    where it is not the host. `ca_file` None: the system's roots. `cert_file` and `key_file` together: mTLS."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a participant listens and what it speaks.

    `codec` "protobuf": the payload is mapped to the method's messages, found through server reflection or in
    `descriptor_set`, a file written by `protoc --include_imports -o`. `codec` "json": JSON bytes are the messages.
    """

    host: str
    port: int
    codec: Literal["protobuf", "json"] = "protobuf"
    descriptor_set: str | None = None
    tls: ServiceTls | None = None
