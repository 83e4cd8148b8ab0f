"""Back-off and quarantine."""

from __future__ import annotations

from llmserve.lifecycle.restart_backoff import GIVE_UP, RestartBackoff


def test_pause_doubles_until_restarts_end() -> None:
    deaths = RestartBackoff()
    assert [deaths.pause_s(1.0) for _ in range(GIVE_UP)] == [1.0, 2.0, 4.0, 8.0, None]
    assert deaths.pause_s(1.0) is None


def test_an_engine_that_was_stable_has_no_deaths_in_a_row() -> None:
    deaths = RestartBackoff()
    for _ in range(GIVE_UP - 1):
        deaths.pause_s(1.0)
    assert deaths.pause_s(1.0, stable=True) == 1.0
    assert deaths.in_a_row == 1
