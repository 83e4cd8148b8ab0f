"""vLLM's client of an engine, with the check of every constraint before it."""

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
    """A refused constraint, as vLLM's handlers understand it."""

    def __init__(self, refusal: RequestError) -> None:
        super().__init__(refusal.message, parameter=refusal.param)
        self.refusal = refusal


class CheckedLLM(AsyncLLM):
    """An AsyncLLM that gives its engine only constraints that compiled in the sandbox.

    Every request of vLLM's handlers passes `add_request`, also with a constraint that a
    parser derived from `tools`. vLLM's own check is off: it would run on the event loop.
    A request that went around this one has no backend, and the engine core refuses it.
    """

    _grammars: ConstraintCompiler

    def check_with(self, grammars: ConstraintCompiler) -> None:
        self._grammars = grammars
        self.input_processor.structured_outputs_config = None

    def prepare_constraints(self) -> None:
        """Have the tokenizer loaded where constraints are checked."""
        self._grammars.prepare(self._checked_model)

    async def check_explicit(self, body: Mapping[str, Any]) -> None:
        """Raises RequestError, with its place, for a constraint in a body that is refused."""
        for place, constraint in constraints_of(body):
            refusal = await self._grammars.refusal_of(self._checked_model, place, constraint)
            if refusal is not None:
                raise refusal

    async def check(self, params: Any) -> None:
        """Complete the parameters of a request. Raises Refused for what does not compile."""
        structured = getattr(params, "structured_outputs", None)
        if structured is None:
            return
        given = {
            kind: value for kind in _CONSTRAINTS if (value := getattr(structured, kind)) is not None
        }
        verdict = await self._grammars.check(self._checked_model, given)
        # An explicit constraint was checked at its place; what remains comes from `tools`.
        place = "response_format" if "json_object" in given else "tools"
        if (refusal := verdict.refusal(place)) is not None:
            raise Refused(refusal)
        for kind, value in verdict.fields.items():
            setattr(structured, kind, value)
        structured._backend = verdict.backend  # noqa: SLF001  # what vLLM's own check sets
        structured._backend_was_auto = True  # noqa: SLF001  # likewise

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *arguments: Any, **more: Any
    ) -> Any:
        await self.check(params)
        return await super().add_request(request_id, prompt, params, *arguments, **more)

    @cached_property
    def _checked_model(self) -> Model:
        """The engine's config, and a key of all in it that decides what compiles."""
        config = self.vllm_config
        model = config.model_config
        decides = (
            (model.model, model.revision, model.tokenizer, model.tokenizer_revision),
            (model.tokenizer_mode, model.trust_remote_code, model.get_vocab_size()),
            (config.structured_outputs_config, config.num_speculative_tokens),
        )
        key = hashlib.sha256(repr(decides).encode()).hexdigest()
        # As vLLM sends it to the engine core, also where the config's class is a model's own.
        return Model(key, bytes(ForkingPickler.dumps(config)))
