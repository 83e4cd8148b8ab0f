"""The services that routes use."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmserve.api.body_thread import BodyThread
from llmserve.api.schedule import SCHEDULE, Schedule
from llmserve.http.request_batcher import RequestBatcher

if TYPE_CHECKING:
    from llmserve.lifecycle.operator import ModelOperator
    from llmserve.lifecycle.pool import Pool
    from llmserve.metrics import Metrics


@dataclass
class Services:
    """One per server, in `request.app.state.services`."""

    pool: Pool
    metrics: Metrics
    operator: ModelOperator
    schedule: Schedule = SCHEDULE
    batcher: RequestBatcher = field(init=False)
    off_loop: BodyThread = field(default_factory=BodyThread)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.batcher = RequestBatcher(self.schedule)
