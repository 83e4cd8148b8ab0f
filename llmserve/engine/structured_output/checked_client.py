"""vLLM's engine client, with a check of each constraint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from llmserve.engine.structured_output.compiler import KINDS, Model, constraints_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmserve.engine.structured_output.compiler import ConstraintCompiler
    from llmserve.errors import RequestError

_CONSTRAINTS = (*KINDS, "json_object")


class Refused(VLLMValidationError):
    """A refused constraint as an exception that vLLM's handlers expect."""

    def __init__(self, refusal: RequestError) -> None:
        super().__init__(refusal.message, parameter=refusal.param)
        self.refusal = refusal


class CheckedLLM(AsyncLLM):
    """An AsyncLLM that passes on only constraints that compiled in the sandbox.

    Each request of vLLM's handlers passes `add_request`, also those whose constraint a parser
    derived from `tools`. vLLM's own check is off: it would run on the event loop. The engine core
    refuses a request without a check, since it has no backend.
    """

    _compiler: ConstraintCompiler

    def check_with(self, compiler: ConstraintCompiler) -> None:
        self._compiler = compiler
        self.input_processor.structured_outputs_config = None

    def prepare_constraints(self) -> None:
        """Start to load the tokenizer in the process that checks constraints."""
        self._compiler.prepare(self._checked_model)

    async def check_explicit(self, body: Mapping[str, Any]) -> None:
        """Raises RequestError with the place of a refused constraint in a body."""
        for place, constraint in constraints_of(body):
            refusal = await self._compiler.refusal_of(self._checked_model, place, constraint)
            if refusal is not None:
                raise refusal

    async def check(self, params: Any) -> None:
        """Complete the parameters of a request. Raises Refused."""
        structured = getattr(params, "structured_outputs", None)
        if structured is None:
            return
        given = {
            kind: value for kind in _CONSTRAINTS if (value := getattr(structured, kind)) is not None
        }
        verdict = await self._compiler.check(self._checked_model, given)
        # Explicit constraints were checked at their place; others are derived from `tools`.
        place = "response_format" if "json_object" in given else "tools"
        if (refusal := verdict.refusal(place)) is not None:
            raise Refused(refusal)
        for kind, value in verdict.fields.items():
            setattr(structured, kind, value)
        structured._backend = verdict.backend  # noqa: SLF001  # as vLLM's own check does
        structured._backend_was_auto = True  # noqa: SLF001  # likewise

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **more: Any
    ) -> Any:
        await self.check(params)
        return await super().add_request(request_id, prompt, params, *arguments, **more)

    @cached_property
    def _checked_model(self) -> Model:
        """The engine's config, and a key of all its settings that affect compilation."""
        config = self.vllm_config
        model = config.model_config
        settings = (
            (model.model, model.revision, model.tokenizer, model.tokenizer_revision),
            (model.tokenizer_mode, model.trust_remote_code, model.get_vocab_size()),
            (config.structured_outputs_config, config.num_speculative_tokens),
        )
        key = hashlib.sha256(repr(settings).encode()).hexdigest()
        # As vLLM sends it to the engine core, which works for config classes of models too.
        return Model(key, bytes(ForkingPickler.dumps(config)))
