"""Generates the Python of `proto/` beside each .proto: `python -m server.protogen` (what `make proto` runs).

Needs the `dev` extra (grpcio-tools). With `--out DIR` it writes there instead, which is how a test sees whether what is
checked in is stale.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

PROTO_ROOT = Path(__file__).resolve().parent.parent / "proto"


def generate(out: Path, root: Path = PROTO_ROOT) -> list[Path]:
    """Writes `*_pb2.py`, `*_pb2.pyi` and, for files with a service, `*_grpc.py`; returns the .proto files read, sorted.

    `RuntimeError`: protoc refused a file; the text is protoc's.
    """
    sources = sorted(root.rglob("*.proto"))
    # The plugin lies beside the interpreter and need not be on PATH when no environment is activated.
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-grpclib_python"
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        f"--proto_path={root}",
        f"--plugin=protoc-gen-grpclib_python={plugin}",
        *(f"--{kind}_out={out}" for kind in ("python", "pyi", "grpclib_python")),
        *(str(source) for source in sources),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip())
    for path in out.rglob("*_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()  # a file without a service leaves a stub of comments
    return sources


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate Python from the files under proto/.")
    parser.add_argument("--out", type=Path, default=PROTO_ROOT, help="where to write (default: beside the sources)")
    for source in generate(parser.parse_args().out):
        print(source.relative_to(PROTO_ROOT))


if __name__ == "__main__":
    main()
