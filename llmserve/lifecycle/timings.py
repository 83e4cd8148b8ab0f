"""How long replicas stay, wait and rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LifecycleTimings:
    health_check_s: float = 0.5  # between two looks for dead engines and idle models
    hang_check_s: float = 10.0  # between two questions to each engine
    hang_s: float = 45.0  # an engine that neither answers nor works for so long is killed
    # The minimum residency time: of an idle replica its load time, of a busy one a multiple.
    busy_residency: float = 5.0
    min_busy_residency_s: float = 2.0
    max_residency_s: float = 60.0
    first_wake_s: float = 0.5  # assumed load time of a sleeper that has never woken
    first_restart_s: float = 1.0  # pause before the first restart; it doubles
    stable_s: float = 120.0  # after which a death is the first in a row; more than `hang_s`
    release_s: float = 15.0  # within which the driver frees the memory of a dead engine
    release_check_s: float = 0.02  # between two looks at that memory


TIMINGS = LifecycleTimings()
