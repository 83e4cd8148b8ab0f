"""An engine core that is stopped, as a hung one, and goes on."""

from __future__ import annotations

import signal

from llmserve.registry.spec import ModelSpec
from tests.contract.support import CHAT, on_fake_core


async def test_an_engine_that_is_stopped_does_not_respond_and_one_that_goes_on_does() -> None:
    spec = ModelSpec(name="chat", model=str(CHAT), engine={"max_model_len": 512})
    async with on_fake_core(spec) as (serving, core):
        assert await serving.responds(60)
        core.send_signal(signal.SIGSTOP)
        try:
            assert not await serving.responds(0.3)
        finally:
            core.send_signal(signal.SIGCONT)
        assert await serving.responds(60)
