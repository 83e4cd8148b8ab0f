"""Who may enter: slots of one model. Decides only; nothing here waits."""

from __future__ import annotations

from llmserve.errors import Overloaded, quoted


class Slots:
    """The requests a model has in flight, at most `limit`, queued and running."""

    def __init__(self, model: str, limit: int) -> None:
        self.model = model
        self.limit = limit
        self.in_flight = 0

    def count(self) -> int:
        return self.in_flight

    def take(self) -> Slot:
        """Raises Overloaded when all are taken."""
        if self.in_flight >= self.limit:
            raise Overloaded(
                f"The model {quoted(self.model)} has {self.limit} requests in flight, its "
                "max_in_flight; try again.",
                retry_after_s=1,
            )
        self.in_flight += 1
        return Slot(self)


class Slot:
    """A place that is given back once, however often it is left."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    def release(self) -> None:
        if self._slots is not None:
            self._slots.in_flight -= 1
            self._slots = None
