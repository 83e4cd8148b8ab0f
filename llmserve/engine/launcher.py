"""Starts vLLM engines, several at once, each call in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

from vllm import envs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import utils as engine_utils

from llmserve.engine.engine import Bounds, Engine
from llmserve.engine.engine_arguments import disable_logging, engine_arguments
from llmserve.engine.fastpath.output_processor import StreamingOutputProcessor
from llmserve.engine.metrics import EngineMetrics
from llmserve.engine.parent_watch import ParentWatch
from llmserve.engine.startup_log import cause_of
from llmserve.engine.structured_output.checked_client import CheckedLLM
from llmserve.engine.structured_output.compiler import ConstraintCompiler
from llmserve.engine.worker.plugin import instance_of, log_file
from llmserve.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llmserve.engine.zygote import Zygote
    from llmserve.registry.spec import ModelSpec


class Launcher:
    """Starts engines, forked by `zygote` if there is one, and ends them when the server stops."""

    def __init__(
        self, log_dir: Path, bounds: Bounds | None = None, zygote: Zygote | None = None
    ) -> None:
        self._log_dir = log_dir
        if zygote is not None:
            engine_utils.get_mp_context = zygote.context
        self.compiler = ConstraintCompiler()
        self._bounds = bounds or Bounds()
        # Building a config can change os.environ (vllm/config/vllm.py): one at a time.
        self._config_lock = threading.Lock()
        self._starting = 0
        self._watch_lock = threading.Lock()
        self._watches: weakref.WeakSet[ParentWatch] = weakref.WeakSet()
        self._stopped = False

    def new_watch(self) -> ParentWatch:
        """Return the watch of an engine to start. Raises StartupError if the server stops."""
        with self._watch_lock:
            if self._stopped:
                raise StartupError("the server is stopping")
            watch = ParentWatch()
            self._watches.add(watch)
            return watch

    def start(
        self,
        spec: ModelSpec,
        number: int = 0,
        addresses: dict[str, str] | None = None,
        *,
        sleeps: bool = False,
        watch: ParentWatch | None = None,
    ) -> Engine:
        """Start an engine and return it when it is ready. Blocks.

        `number` is that of the model's replica. `addresses` belong to a running engine core, in
        the form in which vLLM passes them to its API server processes. `sleeps` turns on sleep
        mode, which a CPU does not have. Killing `watch` ends the start at once.

        Raises StartupError with the root cause in one line.
        """
        watch = watch or self.new_watch()
        try:
            with self._uncached_environment():
                return self._start(spec, number, addresses, watch, sleeps=sleeps)
        except BaseException as error:
            watch.kill()
            if isinstance(error, StartupError) or not isinstance(error, Exception):
                raise
            raise StartupError(cause_of(error, self.log_of(spec, number))) from error

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        """Return the log file of a replica's engine."""
        return log_file(self._log_dir, spec.name, number if spec.replicas > 1 else None)

    def _start(
        self,
        spec: ModelSpec,
        number: int,
        addresses: dict[str, str] | None,
        watch: ParentWatch,
        *,
        sleeps: bool,
    ) -> Engine:
        metrics = EngineMetrics(spec.name, number, spec.parallel_sizes.get("data_parallel_size", 1))
        with self._config_lock:
            self._require_not_killed(watch)
            arguments = engine_arguments(spec, sleeps=sleeps)
            disable_logging(arguments)
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if spec.replicas > 1:
            config.instance_id = instance_of(number, config.instance_id)
        self._require_not_killed(watch)
        with watch.watching():
            client = CheckedLLM.from_vllm_config(
                config, stat_loggers=[metrics.logger_class], client_addresses=addresses
            )
        client.check_with(self.compiler)
        metrics.take_over(client)
        StreamingOutputProcessor.take_over(client)
        # vLLM reads it for every request, and transformers searches for it each time.
        eos_token_id = client.renderer.get_eos_token_id()
        client.renderer.get_eos_token_id = lambda: eos_token_id
        engine = Engine(client, arguments, metrics, watch, self.log_of(spec, number))
        engine.bounds = self._bounds
        return engine

    @contextlib.contextmanager
    def _uncached_environment(self) -> Iterator[None]:
        """Let vLLM cache its settings only while no engine starts: a start can change them.

        Without the cache vLLM reads os.environ, for some settings at every token.
        """
        with self._config_lock:
            self._starting += 1
            envs.disable_envs_cache()
        try:
            yield
        finally:
            with self._config_lock:
                self._starting -= 1
                if not self._starting:
                    envs.enable_envs_cache()

    def stop(self) -> None:
        """Prevent further starts, and end the processes of all engines, started or starting."""
        self.compiler.stop()
        with self._watch_lock:
            self._stopped = True
            watches = list(self._watches)
        for watch in watches:
            watch.kill()

    def _require_not_killed(self, watch: ParentWatch) -> None:
        if watch.is_killed:
            raise StartupError(
                "the server is stopping" if self._stopped else "the start was cancelled"
            )
