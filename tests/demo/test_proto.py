"""The generated code of the demo that is checked in."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_stubs_of_the_demo_are_those_of_its_proto(tmp_path: Path) -> None:
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-grpclib_python"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}"),
            f"--plugin=protoc-gen-grpclib_python={plugin}",
            *(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpclib_python")),
            str(ROOT / "demo/proto/orders.proto"),
        ],
        check=True,
    )
    for name in ("orders_pb2.py", "orders_pb2.pyi", "orders_grpc.py"):
        checked_in = ROOT / "demo/proto" / name
        fresh = tmp_path / "demo/proto" / name
        assert fresh.read_text() == checked_in.read_text(), f"run `make proto`: {name} is stale"
