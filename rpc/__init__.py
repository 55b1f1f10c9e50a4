"""gRPC both ways: participants called (`caller.py`) and clients served (`server.py`)."""

import bridge as bridge  # before grpclib anywhere in this package: see bridge/__init__.py
