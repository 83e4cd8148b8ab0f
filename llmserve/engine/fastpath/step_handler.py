"""An engine's steps, handled in the turn of the loop in which they come.

vLLM receives a step in one task and handles it in another, with a queue and two wake-ups
between (vllm/v1/engine/core_client.py, `AsyncMPClient._ensure_output_queue_task`;
vllm/v1/engine/async_llm.py, `AsyncLLM._run_output_handler`), and its text leaves in a turn
of its own after that. Here one call does all three. Only steps come this way: answers to
calls, an engine's end and whatever fails are for vLLM's tasks, which stay.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import IterationStats

from llmserve.engine.fastpath import guards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)


class StepHandler:
    """What vLLM's two tasks do for a step."""

    def __init__(self, client: AsyncLLM) -> None:
        core: Any = client.engine_core
        self._core = core
        self._decode = core.decoder.decode
        self._outputs = client.output_processor
        self._logger = client.logger_manager if client.log_stats else None
        self._failed = False
        self._aborts: set[asyncio.Task[None]] = set()

    @staticmethod
    def all_there_is(client: AsyncLLM) -> bool:
        """Whether vLLM does no more: it keeps books of images, and of several engine cores."""
        several = hasattr(type(client.engine_core), "process_engine_outputs")
        known = guards.knows(EngineCoreOutputs)
        return known and not several and client.renderer.mm_processor_cache is None

    def take(self, frames: Sequence[Any]) -> bool:
        """Whether it was a step, which has been handled; none is after one that failed."""
        try:
            outputs: EngineCoreOutputs = self._decode(frames)
        except Exception:
            self._failed = True
            return False  # the word of an engine's end, perhaps: vLLM looks
        if outputs.utility_output is not None:
            return False
        if not self._failed:
            try:
                self._handle(outputs)
            except Exception as error:
                self._failed = True
                self._core.outputs_queue.put_nowait(error)  # ends all requests
        return True

    def _handle(self, step: EngineCoreOutputs) -> None:
        outputs, logger, stats = step.outputs, self._logger, None
        if outputs:
            stats = IterationStats() if logger is not None else None
            done = self._outputs.process_outputs(
                outputs, step.timestamp, stats, weight_version=step.weight_version
            )
            if done.reqs_to_abort:  # a stop string was found
                self._abort(done.reqs_to_abort)
        elif step.scheduler_stats is None:
            return
        self._outputs.update_scheduler_stats(step.scheduler_stats)
        if logger is not None:
            try:
                logger.record(
                    engine_idx=step.engine_index,
                    scheduler_stats=step.scheduler_stats,
                    iteration_stats=stats,
                    mm_cache_stats=None,
                )
            except Exception:  # vLLM would end all requests over it
                log.exception("a step could not be counted")

    def _abort(self, request_ids: list[str]) -> None:
        aborting = asyncio.ensure_future(self._core.abort_requests_async(request_ids))
        self._aborts.add(aborting)
        aborting.add_done_callback(self._aborted)

    def _aborted(self, aborting: asyncio.Task[None]) -> None:
        self._aborts.discard(aborting)
        if not aborting.cancelled() and (error := aborting.exception()) is not None:
            log.error("requests could not be aborted", exc_info=error)
