"""A fake engine core that plans a step while the one before runs, as vLLM's does.

    python -m benchmarks.ahead_core INPUT OUTPUT

What fake_core.py does (without its gate and its limit), but that a request is in the plan made
when a step ends only if it is here by then, and the step so planned is the next but one.
A plan takes prompts in their order, as many as fit into TOKENS beside one token for each
request that runs; the step lasts `step_ms` and `prefill_us` for each of their tokens. (vLLM
would begin a prompt of which only a part fits.) The report says when requests arrived, up to a
step's sending late, and when ends were sent.

Source: vllm/v1/engine/core.py (`step_with_batch_queue`), vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks import fake_core

if TYPE_CHECKING:
    from benchmarks.fake_core import Stream

TOKENS = 8192  # of a step, vLLM's `max_num_batched_tokens` for a server
_LATE_S = 0.001  # by which a step may end too late before the next one is put off
_WAIT_S = 0.001  # a shorter wait is too short for poll
_LOOK_S = 0.0001  # between two looks then


class AheadCore(fake_core.FakeCore):
    def run(self) -> None:
        while True:
            while not self._waiting:
                self._listen(1.0)
            self._work(self._plan(0))

    def _work(self, step: list[Stream]) -> None:
        """Until nothing is left to do. `step` is what starts in it."""
        planned: list[Stream] = []
        end_s = time.monotonic()
        while self._running or step or planned:
            lasts_s = self._settings.step_s + self._prefill_of(step)
            end_s = max(end_s, time.monotonic() - _LATE_S) + lasts_s
            self._listen_until(end_s)
            self._start(step, time.monotonic())
            ending = len(self._ends.get(self._step + 1, ()))
            self._send_step()
            self._report.ended_s += [time.monotonic()] * ending
            self._listen(0)
            step, planned = planned, self._plan(len(planned))

    def _listen_until(self, tick: float) -> None:
        while (left := tick - time.monotonic()) > 0:
            if left < _WAIT_S:
                self._listen(0)
                time.sleep(min(left, _LOOK_S))
            else:
                self._listen(left)
        self._listen(0)

    def _plan(self, ahead: int) -> list[Stream]:
        """What starts in the next step but one; `ahead` requests do in the next."""
        left = TOKENS - len(self._running) - ahead
        chosen = []
        for stream in self._waiting.values():
            left -= stream.prompt_tokens
            if left < 0:
                break
            chosen.append(stream)
        for stream in chosen:
            del self._waiting[stream.output.request_id]
        return chosen

    def _add(self, request: fake_core._Request) -> None:
        super()._add(request)
        self._report.arrived_s.append(time.monotonic())


if __name__ == "__main__":
    fake_core.main(AheadCore)
