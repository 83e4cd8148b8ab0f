"""Creates vLLM's handlers of one model, with llmserve's changes to them."""

from __future__ import annotations

import asyncio
import threading
from argparse import Namespace
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

import llmserve.engine.media  # noqa: F401  # registers the connector for media URLs
from llmserve.engine import response_history
from llmserve.engine.cli_args import FrontendArgs
from llmserve.engine.endpoint_handlers import HANDLERS
from llmserve.engine.pacing import PacedRendering
from llmserve.engine.tokenization import BoundedTokenization, release_gil
from llmserve.engine.tool_parsers import replace_parsers

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from llmserve.engine.engine import Engine
    from llmserve.registry.spec import ModelSpec

# The name by which the running request addresses its model.
requested_name: ContextVar[str] = ContextVar("requested_name")
# vLLM creates counters of the whole process if there are none yet.
_initializing = threading.Lock()


class PublicNames(OpenAIServingModels):
    """Answers have the name of their request, not the model's first name."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return requested_name.get(super().model_name(lora_request))


async def create_handlers(spec: ModelSpec, engine: Engine) -> State:
    """Return vLLM's handlers of `spec`, as attributes of a State. Raises EngineError."""
    state = State()
    async with engine.limited("report its tasks"):
        tasks = await engine.client.get_supported_tasks()
        await _initialize(engine, state, spec, tasks)
    # init_app_state creates these objects itself; none of its arguments sets a class.
    state.openai_serving_models.__class__ = PublicNames
    replace_parsers(state)
    responses = getattr(state, "openai_serving_responses", None)  # absent in models that embed
    if responses is not None:
        response_history.keep_tool_calls(responses)
    if (tokenization := getattr(state, "serving_tokenization", None)) is not None:
        tokenization.__class__ = BoundedTokenization
        release_gil(tokenization.renderer)
    if spec.sampling.max_tokens is not None:
        _remove_max_tokens_limit(state)
    for processor in _input_processors(state):
        processor.render_async = PacedRendering(processor.render_async)
    return state


async def _initialize(engine: Engine, state: State, spec: ModelSpec, tasks: Any) -> None:
    """Run vLLM's `init_app_state` in a thread: parsers and templates take tenths of a second.

    Only adapters need the engine, which belongs to the calling loop.
    """
    arguments = _frontend_arguments(spec, engine)
    adapters = _adapters(spec)
    lora_config = engine.client.vllm_config.lora_config
    if lora_config is not None and lora_config.default_mm_loras:  # vLLM adds adapters itself
        arguments.lora_modules = adapters
        await init_app_state(engine.client, state, arguments, tasks)
        return

    def init() -> None:
        with _initializing:
            asyncio.run(init_app_state(engine.client, state, arguments, tasks))

    await asyncio.to_thread(init)
    state.openai_serving_models.static_lora_modules = adapters
    await state.openai_serving_models.init_static_loras()


def _adapters(spec: ModelSpec) -> list[LoRAModulePath]:
    """Return the adapters in sorted order: an adapter's id is its index, and the engine keeps it."""
    return [LoRAModulePath(*each) for each in sorted(spec.loras.items())]


def _frontend_arguments(spec: ModelSpec, engine: Engine) -> Namespace:
    """Return what vLLM's server reads from its command line: engine and front-end arguments."""
    frontend = FrontendArgs(
        chat_template=spec.chat_template,
        default_chat_template_kwargs=spec.chat_template_kwargs or None,
        tool_call_parser=spec.tool_call_parser,
        enable_auto_tool_choice=spec.tool_call_parser is not None,
    )
    names = {"served_model_name": list(spec.names)}
    return Namespace(**vars(frontend) | vars(engine.arguments) | names)


def _handlers_of(state: State) -> list[Any]:
    owners = sorted({handler.owner for handler in HANDLERS.values()})
    return [each for owner in owners if (each := getattr(state, owner, None)) is not None]


def _input_processors(state: State) -> list[Any]:
    """Return what prepares the inputs of pooling requests, each in a call of its own."""
    found: list[Any] = []
    for handler in _handlers_of(state):
        found += getattr(handler, "io_processors", {}).values()
        found += filter(None, [getattr(handler, "io_processor", None)])
    return found


def _remove_max_tokens_limit(state: State) -> None:
    """Make a default `max_tokens` a default only; vLLM takes it for a limit as well."""
    for handler in _handlers_of(state):
        if hasattr(handler, "override_max_tokens"):
            handler.override_max_tokens = None
