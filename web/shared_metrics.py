"""`/metrics` of several workers on one port: whoever is asked answers for all, each series with its `worker`.

A scraper cannot choose the process it reaches. So each worker writes what it has counted into a folder they share, once
a second, and the one that is asked puts the files together. A worker that died keeps what it has counted until its
successor, which counts from zero, overwrites it: to Prometheus a counter that was reset. What it said of its state is
not repeated when it has been silent for some time: its sagas are with others by then, and it is not ready.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

log = logging.getLogger("saga.web")

WRITE_SECS = 1.0
"""How old another worker's figures may be; far below any scrape interval."""

SILENT_SECS = 10.0
"""After how long without a word a worker's gauges are no longer told: above what a busy worker may be late by."""

READY = "saga_ready"

OF_THE_STORE = frozenset(
    {"saga_open", "saga_undo_debt", "saga_undo_debt_oldest_seconds", "saga_store_counted_timestamp_seconds"}
)
"""Metrics that every worker reads from the store they share: given once, by whoever is asked."""


class _Sample(msgspec.Struct, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class _Family(msgspec.Struct, array_like=True):
    name: str
    documentation: str
    type: str
    samples: list[_Sample]


class SharedMetrics:
    """The metrics of worker `number` in `registry`, and those of its siblings in `folder`."""

    def __init__(self, registry: CollectorRegistry, folder: Path, number: int) -> None:
        self._registry = registry
        self._folder = folder
        self._number = number

    async def run(self) -> None:
        """Writes this worker's figures now and then, until it is cancelled."""
        while True:
            try:
                await trio.to_thread.run_sync(self._write, self._collected())
            except OSError as error:
                log.warning("metrics_not_shared error=%s", error)
            await trio.sleep(WRITE_SECS)

    async def render(self) -> bytes:
        """The text a scraper gets: this worker's figures as they are, the others' as they last wrote them."""
        own = self._collected()
        others = await trio.to_thread.run_sync(self._read_others)
        return generate_latest(_Merged({str(self._number): own} | others, str(self._number)))

    def _collected(self) -> list[_Family]:
        return [
            _Family(
                metric.name,
                metric.documentation,
                metric.type,
                [_Sample(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
            )
            for metric in self._registry.collect()
        ]

    def _write(self, families: list[_Family]) -> None:
        partial = self._folder / f"{self._number}.new"
        partial.write_bytes(msgspec.msgpack.encode(families))
        partial.rename(self._folder / f"{self._number}.metrics")

    def _read_others(self) -> dict[str, list[_Family]]:
        found = {}
        for file in sorted(self._folder.glob("*.metrics")):
            if file.stem == str(self._number):
                continue
            with file.open("rb") as opened:
                written_at = os.fstat(opened.fileno()).st_mtime
                families = msgspec.msgpack.decode(opened.read(), type=list[_Family])
            found[file.stem] = families if time.time() < written_at + SILENT_SECS else _of_a_silent(families)
        return found


def _of_a_silent(families: list[_Family]) -> list[_Family]:
    """What may still be said of a worker that says nothing: what it has counted, and that it is not ready."""
    kept = [family for family in families if family.type not in ("gauge", "info")]
    for family in families:
        if family.name == READY:
            samples = [_Sample(sample.name, sample.labels, 0.0) for sample in family.samples]
            kept.append(_Family(family.name, family.documentation, family.type, samples))
    return kept


class _Merged(Collector):
    """The families of all workers, each once."""

    def __init__(self, by_worker: dict[str, list[_Family]], asked: str) -> None:
        self._by_worker = by_worker
        self._asked = asked

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for worker, families in sorted(self._by_worker.items()):
            for family in families:
                shared = family.name in OF_THE_STORE
                if shared and worker != self._asked:
                    continue
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = sample.labels if shared else {**sample.labels, "worker": worker}
                    metric.add_sample(sample.name, labels, sample.value)
        yield from merged.values()
