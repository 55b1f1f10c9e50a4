"""Configuration files as tests write them: in the current folder, read at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import Config, ConfigInvalid
from server.config_loading import load_config

KAFKA = "kafka: {brokers: ['k:9092']}"
AUTH = "auth: {jwks_url: 'https://a/jwks', issuer: i, audience: a}"


def loaded(text: str, **environ: str) -> Config:
    """The configuration of a file `c.yaml` with that text."""
    Path("c.yaml").write_text(text, encoding="utf-8")
    return load_config(Path("c.yaml"), environ)


def problems(text: str, **environ: str) -> list[str]:
    """What is wrong with it."""
    with pytest.raises(ConfigInvalid) as caught:
        loaded(text, **environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)
