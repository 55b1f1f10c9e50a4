"""What a participant must remember so that calls delivered twice, or in the wrong order, do no harm.

A real participant keeps this in its own database, in the transaction that also makes the change. Here it is a dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from demo.proto.orders_pb2 import Undone

Reply = TypeVar("Reply", bound=Message)
Metadata = Mapping[str, Any] | None


class Journal:
    """Answers by idempotency key, and the steps that were undone.

    The key is `<saga id>:<step index>:execute`, and `…:compensate` for the undo of the same step: what is before the
    last colon names the step.
    """

    def __init__(self) -> None:
        self._answers: dict[str, Message] = {}
        self._undone: set[str] = set()

    def knows(self, metadata: Metadata) -> bool:
        """Whether this very call has been answered before."""
        return _key(metadata) in self._answers

    def once(self, metadata: Metadata, act: Callable[[], Reply]) -> Reply:
        """What `act` returned the first time this key came; it is not run a second time.

        A step that was undone already is refused: its own call was late, and doing it now would never be undone.
        An error raised by `act` is not kept, for nothing was done.
        """
        key = _key(metadata)
        if key in self._answers:
            return self._answers[key]  # type: ignore[return-value]  # what `act` of this same key has returned
        if _step(key) in self._undone:
            raise GRPCError(Status.FAILED_PRECONDITION, "this step was undone before it arrived")
        answer = self._answers[key] = act()
        return answer

    def undo(self, metadata: Metadata, act: Callable[[Any], None]) -> Undone:
        """Runs `act` on the answer the step was given, once. Undoing what was never done succeeds."""
        step = _step(_key(metadata))
        done = self._answers.get(f"{step}:execute")
        if done is not None and step not in self._undone:
            act(done)
        self._undone.add(step)
        return Undone(was_done=done is not None)


def _key(metadata: Metadata) -> str:
    key = (metadata or {}).get("idempotency-key")
    if not key:
        raise GRPCError(Status.INVALID_ARGUMENT, "metadata idempotency-key is missing")
    return str(key)


def _step(key: str) -> str:
    return key.rpartition(":")[0]
