"""Request templates: vLLM's engine requests, copied for later bodies of the same kind."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

from llmserve.engine.fastpath.endpoint_adapters import TEXT_LIMIT
from llmserve.engine.fastpath.output_processor import PreparedRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmserve.engine.fastpath.chunk_templates import ChunkTemplate
    from llmserve.engine.fastpath.endpoint_adapters import EndpointAdapter
    from llmserve.engine.fastpath.output_processor import GenerateCall
    from llmserve.engine.fastpath.tokenizer import Encode

_TEMPLATES = 256  # kinds of requests with a template, per endpoint
# Arguments of `generate` that do not depend on the prompt.
_COPIED_ARGUMENTS = frozenset({"lora_request", "priority"})


@dataclass
class RequestTemplate:
    """Creates engine requests from bodies of one kind."""

    adapter: EndpointAdapter
    client: AsyncLLM
    serving: Any
    chunks: ChunkTemplate
    text: Callable[[Any], str]
    encode: Encode
    first: EngineCoreRequest  # vLLM's, for the first body
    add_special_tokens: bool
    limit: int | None  # `max_tokens` of a body that sets none

    def request(self, prompt: Any, body: dict[str, Any], base_id: str) -> PreparedRequest | None:
        """Return the engine request; None if vLLM must handle the body.

        Raises what the chat template raises.
        """
        text = self.text(prompt)
        if len(text) > TEXT_LIMIT:
            return None
        ids = self.encode(text, add_special_tokens=self.add_special_tokens)
        limit = next((body[name] for name in self.adapter.limits if name in body), self.limit)
        if not ids or len(ids) + (limit or 1) > self.client.model_config.max_model_len:
            return None
        params = copy.copy(self.first.params)
        params.max_tokens = int(
            get_max_tokens(
                self.client.model_config.max_model_len,
                limit,
                len(ids),
                self.serving.default_sampling_params,
                self.serving.override_max_tokens,
            )
        )
        params.seed = body.get("seed", params.seed)
        request = copy.copy(self.first)
        request.request_id = f"{self.adapter.prefix}{base_id}{self.adapter.suffix}"
        request.prompt_token_ids = ids
        request.sampling_params = params
        request.arrival_time = time.time()
        return PreparedRequest(request, request.request_id)


@dataclass
class RequestTemplates:
    """The templates of one endpoint by key, last used last; None for a kind that cannot have one."""

    kept: OrderedDict[bytes, RequestTemplate | None] = field(default_factory=OrderedDict)

    def find(self, key: bytes) -> RequestTemplate | None:
        template = self.kept.get(key)
        if template is not None:
            self.kept.move_to_end(key)
        return template

    def keep(self, key: bytes, template: RequestTemplate | None) -> None:
        self.kept[key] = template
        if len(self.kept) > _TEMPLATES:
            self.kept.popitem(last=False)


def engine_request(client: AsyncLLM, call: GenerateCall) -> EngineCoreRequest | None:
    """Return what `AsyncLLM.add_request` makes of a call; None if it adds to that, or refuses."""
    more = {name: value for name, value in call.more.items() if value is not None}
    if not more.keys() <= _COPIED_ARGUMENTS:
        return None
    try:
        return client.input_processor.process_inputs(
            call.request_id, call.prompt, call.params, supported_tasks=("generate",), **more
        )
    except Exception:  # the request itself raises it again
        return None
