"""When a dead engine is started again, and when no more. Pure."""

from __future__ import annotations

# An engine that was ready for this long has not died in a row; longer than it takes to notice
# that one hangs (`watch.HUNG_S`).
STABLE_S = 120.0
GIVE_UP = 5  # deaths in a row
_FIRST_S = 1.0


class RestartBackoff:
    """Of one replica: exponential back-off, then quarantine."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.total = 0

    def forget(self) -> None:
        """An operator wants it tried again."""
        self.in_a_row = 0

    def pause_s(self, lived_s: float) -> float | None:
        """Counts a death; the seconds until the next start, or None: no more of them."""
        if lived_s >= STABLE_S:
            self.in_a_row = 0
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= GIVE_UP:
            return None
        return _FIRST_S * 2.0 ** (self.in_a_row - 1)
