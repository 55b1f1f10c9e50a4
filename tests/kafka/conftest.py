"""A broker for each test, and a relay between it and a store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kafka import MockBroker, RealBroker, running_broker

AnyBroker = MockBroker | RealBroker


@pytest.fixture
def broker() -> Iterator[AnyBroker]:
    with running_broker() as running:
        yield running


@pytest.fixture
def mock_broker(broker: AnyBroker) -> MockBroker:
    """For cases in which the broker has to fail to order."""
    if not isinstance(broker, MockBroker):
        pytest.skip("a real broker does not fail to order")
    return broker
