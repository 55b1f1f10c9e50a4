"""Two pages for people: the sagas, and one saga as a timeline with the undo beside each step.

Rendered on the server, read only, with no script from anywhere; what is shown comes from `SagaService` alone.
"""

from __future__ import annotations

from quart_trio import QuartTrio

from saga.service import SagaService


def add_pages(app: QuartTrio, service: SagaService) -> None:
    """Adds `/` and `/sagas/{saga_id}`."""
