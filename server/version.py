"""The product's version."""

from __future__ import annotations

from importlib import metadata


def product_version() -> str:
    """The installed version; a word instead where the code runs without having been installed."""
    try:
        return metadata.version("saga-orchestrator")
    except metadata.PackageNotFoundError:
        return "uninstalled"
