"""Fixtures of the tests of the server."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder of its own, with no configuration in it."""
    monkeypatch.chdir(tmp_path)
