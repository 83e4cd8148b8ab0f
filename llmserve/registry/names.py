"""Public names and their models. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmserve.errors import ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmserve.registry.spec import ModelSpec


class ModelNames:
    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self.models = tuple(specs)
        self._by_name = {name: spec for spec in self.models for name in spec.public_names}

    def find(self, name: str) -> ModelSpec:
        """The model of a public name. Raises ModelNotFound, which lists the known names."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFound(name, self.public_names()) from None

    def public_names(self) -> list[str]:
        """All names, without those of hidden models."""
        return [name for spec in self.models if not spec.hidden for name in spec.public_names]
