"""When a replica starts again after a death or a failed start, and when it stops trying. Pure."""

from __future__ import annotations

GIVE_UP = 5  # deaths in a row


class RestartBackoff:
    """Exponential back-off of one replica, then quarantine."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.total = 0

    def forget(self) -> None:
        """Allow starts again, at the request of an operator or after a success."""
        self.in_a_row = 0

    def pause_s(self, first_s: float, *, stable: bool = False) -> float | None:
        """Count a death; return the seconds until the next start, or None to stay down.

        `stable`: the engine was ready for so long that earlier deaths do not count.
        """
        if stable:
            self.in_a_row = 0
        self.in_a_row += 1
        self.total += 1
        return None if self.in_a_row >= GIVE_UP else first_s * 2.0 ** (self.in_a_row - 1)
