"""What a campaign is led through: a server process with access control, a participant, and sagas in every state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fuzz.target import Target
from tests.support.issuer import issuer, token_of
from tests.support.participants import participant
from tests.support.server_process import ServerProcess, server_process

WORKFLOWS = {
    "done": """
name: done
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
""",
    "refused": """
name: refused
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - {name: charge, service: shop, method: Payments.Charge}
""",
    "stuck": """
name: stuck
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Payments.Refund}
  - {name: charge, service: shop, method: Payments.Charge}
""",
    "waiting": """
name: waiting
steps:
  - {name: reserve, service: shop, method: Inventory.Reserve, compensate: Inventory.Release}
  - {name: ship, service: away, method: Shipping.Ship, retry: {initial_interval_ms: 3600000}}
""",
}
"""By what becomes of their sagas: COMPLETED, FAILED and undone, FAILED with an undo that failed, an hour of RUNNING."""

REFUSES = [{"status": "FAILED_PRECONDITION", "message": "declined"}]
SCRIPT = {"Charge": REFUSES, "Refund": REFUSES}

ROLES = {"nobody": None, "auditor": "sys_auditor", "operator": "sys_operator", "admin": "sys_admin"}


class Landscape:
    """`saga_ids`: of one saga each workflow has, and of one that was cancelled."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self._admin = self.headers("admin")
        for text in WORKFLOWS.values():
            assert self._ask("POST", "/api/v1/workflows", {"workflow_yaml": text})["version"] == 1
        self.saga_ids = [self._start(name) for name in (*WORKFLOWS, "waiting")]
        self._ask("POST", f"/api/v1/sagas/{self.saga_ids[-1]}/cancel")
        for saga_id in (*self.saga_ids[:3], self.saga_ids[-1]):
            saga = self._ask("GET", f"/api/v1/sagas/{saga_id}?wait_secs=30")["saga"]
            assert saga["status"] in {"COMPLETED", "FAILED", "CANCELLED"}, saga

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def target(self) -> Target:
        return Target(self.server)

    def headers(self, name: str) -> dict[str, str]:
        """What somebody of that name of `ROLES` sends."""
        role = ROLES[name]
        return {} if role is None else {"Authorization": f"Bearer {token_of(role)}"}

    def document(self) -> dict[str, Any]:
        """What `/openapi.json` says."""
        found: dict[str, Any] = self._ask("GET", "/openapi.json")
        return found

    def _start(self, workflow_name: str) -> str:
        started = self._ask("POST", "/api/v1/sagas", {"workflow_name": workflow_name, "payload": {"order_id": "o-1"}})
        return str(started["saga_id"])

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.server.call(method, path, body, **self._admin)
        assert status < 300, answer
        return answer


@contextmanager
def landscape(folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Landscape]:
    """On a file of SQLite in `folder`, or on what `DATABASE_URL` of `env` names."""
    with issuer() as idp, participant(flavour="grpclib", script=SCRIPT) as shop:
        away = {"host": "127.0.0.1", "port": 1}
        config = {"auth": idp.settings(), "services": {"shop": shop.settings(), "away": away}}
        with server_process(folder, config, env=env) as server:
            server.start()
            yield Landscape(server)
