"""What ended long ago is removed by a real server; its key starts a saga of its own again."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from tests.support.participants import participant
from tests.support.server_process import server_process

ORDER = "name: order\nsteps:\n  - {name: reserve, service: shop, method: Inventory.Reserve}\n"
TENTH_OF_A_SECOND = 0.1 / 86_400


def test_a_saga_that_ended_before_retention_days_is_gone_with_its_key(
    tmp_path: Path, store_config: dict[str, str]
) -> None:
    body = {"workflow_name": "order"}
    with participant(flavour="grpclib", script={"Reserve": [{"times": 1}, {"hang": True}]}) as shop:
        services = {"services": {"shop": shop.settings()}}
        with server_process(tmp_path, {**services, "saga": {"retention_days": 0}}, env=store_config) as server:
            server.start()
            server.register(ORDER)
            _, first = server.call("POST", "/api/v1/sagas", body, Idempotency_Key="k")
            server.ended(first["saga_id"])
            open_saga = server.start_saga("order", {})
            server.kill()
        settings = {"retention_days": TENTH_OF_A_SECOND, "lease_secs": 1.0}
        with server_process(tmp_path, {**services, "saga": settings}, env=store_config) as server:
            server.start()  # the first sweep is at the start, and a start takes longer than that
            while server.call("GET", f"/api/v1/sagas/{first['saga_id']}")[0] != 404:
                pass
            assert server.call("GET", f"/api/v1/sagas/{open_saga}")[0] == 200
            status, again = server.call("POST", "/api/v1/sagas", body, Idempotency_Key="k")
            assert (status, again["saga_id"] == first["saga_id"]) == (201, False)
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as metrics:
                assert b"saga_removed_total 1.0" in metrics.read()
