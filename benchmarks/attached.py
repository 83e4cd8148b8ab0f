"""A front end on engine cores that run already: the child process of a benchmark.

    python -m benchmarks.attached ours REGISTRY ADDRESSES
    python -m benchmarks.attached stock ADDRESSES VLLM-SERVE-ARGUMENTS...

ADDRESSES is JSON: for each model, and each replica of it, the `input_address` and
`output_address` of its core.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import uvloop
from rich.console import Console

from llmserve.engine import gc_policy
from llmserve.lifecycle.placement import Level, Placement
from llmserve.registry import loader
from llmserve.server import process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from llmserve.lifecycle.placement import Takes
    from llmserve.lifecycle.replica import Running, State
    from llmserve.registry.spec import Config, ModelSpec

Addresses = dict[str, list[dict[str, str]]]  # of each model's replicas


class AttachedBackend:
    """Engines whose cores run already."""

    def __init__(self, addresses: Addresses, log_dir: Path) -> None:
        self._addresses = addresses
        self._log_dir = log_dir

    async def start(
        self, spec: ModelSpec, placement: Placement, _: Callable[[State, str], None]
    ) -> Running:
        # Only now: `up` has prepared the environment.
        from llmserve.engine.handlers import ModelHandlers  # noqa: PLC0415  # as above
        from llmserve.engine.launcher import Launcher  # noqa: PLC0415  # imports vLLM

        gc_policy.freeze()
        launcher = Launcher(self._log_dir)
        number = placement.number
        addresses = self._addresses[spec.name][number]
        engine = await asyncio.to_thread(launcher.start, spec, number, addresses)
        running: Running = await ModelHandlers.build(spec, engine)
        return running

    @property
    def memory(self) -> AttachedBackend:
        return self

    @property
    def capacity(self) -> Takes:
        return {}

    def place(self, spec: ModelSpec, number: int) -> Placement:
        del spec
        return Placement(number, {Level.READY: {}})

    def expecting(self, placement: Placement) -> contextlib.AbstractContextManager[None]:
        del placement
        return contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def moves(
        self, placement: Placement, wakes_from: Level | None = None
    ) -> AsyncIterator[None]:
        del placement, wakes_from
        yield

    def log_of(self, spec: ModelSpec, number: int) -> Path:
        return self._log_dir / f"{spec.name}-{number}.log"

    def planned(
        self, config: Config, kept: Mapping[str, Sequence[Placement]]
    ) -> Callable[[], None]:
        del config, kept
        return lambda: None

    def kill(self) -> None:
        """Nothing: the cores are the benchmark's."""


def ours(registry: Path, addresses: Addresses) -> None:
    read = partial(loader.load, registry)
    process.up(read(), Console(), read, AttachedBackend(addresses, registry.parent))


def stock(addresses: dict[str, str], arguments: list[str]) -> None:
    """vLLM's API server as `vllm serve --api-server-count` runs it: one worker of several."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker  # noqa: PLC0415
    from vllm.entrypoints.launchers.launcher import setup_server  # noqa: PLC0415
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    from llmserve.engine.cli_args import make_arg_parser  # noqa: PLC0415  # as above

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    address, listener = setup_server(args, reuse_port=False)
    client = addresses | {"client_count": 1, "client_index": 0}
    uvloop.run(run_server_worker(address, listener, args, client_config=client))


def main() -> None:
    match sys.argv[1:]:
        case ["ours", registry, addresses]:
            ours(Path(registry), orjson.loads(addresses))
        case ["stock", addresses, *arguments]:
            ((only,),) = orjson.loads(addresses).values()
            stock(only, arguments)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
