"""Handles an engine's steps in the event-loop iteration in which they arrive.

vLLM receives a step in one task and handles it in another, with a queue and two wake-ups between
(vllm/v1/engine/core_client.py, `AsyncMPClient._ensure_output_queue_task`;
vllm/v1/engine/async_llm.py, `AsyncLLM._run_output_handler`). The text leaves in a third iteration.
Here one call does all three, for steps only: vLLM's tasks handle replies to calls, the end of an
engine and all failures.
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
    """The work of vLLM's two tasks for a step."""

    def __init__(self, client: AsyncLLM) -> None:
        core: Any = client.engine_core
        self._core = core
        self._decode = core.decoder.decode
        self._outputs = client.output_processor
        self._logger = client.logger_manager if client.log_stats else None
        self._failed = False
        self._aborts: set[asyncio.Task[None]] = set()

    @staticmethod
    def is_complete(client: AsyncLLM) -> bool:
        """Whether vLLM does no more for a step, as with an image cache or several cores."""
        several = hasattr(type(client.engine_core), "process_engine_outputs")
        known = guards.knows(EngineCoreOutputs)
        return known and not several and client.renderer.mm_processor_cache is None

    def handle(self, frames: Sequence[Any]) -> bool:
        """Handle a message; return False for one that is not a step. After a failure steps are dropped."""
        try:
            outputs: EngineCoreOutputs = self._decode(frames)
        except Exception:
            self._failed = True
            return False  # perhaps the end of the engine: for vLLM
        if outputs.utility_output is not None:
            return False
        if not self._failed:
            try:
                self._handle_step(outputs)
            except Exception as error:
                self._failed = True
                self._core.outputs_queue.put_nowait(error)  # ends all requests
        return True

    def _handle_step(self, step: EngineCoreOutputs) -> None:
        outputs, logger, stats = step.outputs, self._logger, None
        if outputs:
            stats = IterationStats() if logger is not None else None
            processed = self._outputs.process_outputs(
                outputs, step.timestamp, stats, weight_version=step.weight_version
            )
            if processed.reqs_to_abort:  # a stop string was found
                self._abort(processed.reqs_to_abort)
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
            except Exception:  # vLLM would end all requests
                log.exception("the metrics of a step were not recorded")

    def _abort(self, request_ids: list[str]) -> None:
        aborting = asyncio.ensure_future(self._core.abort_requests_async(request_ids))
        self._aborts.add(aborting)
        aborting.add_done_callback(self._aborted)

    def _aborted(self, aborting: asyncio.Task[None]) -> None:
        self._aborts.discard(aborting)
        if not aborting.cancelled() and (error := aborting.exception()) is not None:
            log.error("requests were not aborted", exc_info=error)
