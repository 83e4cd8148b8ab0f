"""Public names and their models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmserve.errors import ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmserve.registry.spec import ModelSpec


@dataclass(frozen=True)
class Model:
    """A model with all its public names: its own, its aliases and its adapters'."""

    spec: ModelSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def loras(self) -> frozenset[str]:
        return frozenset(self.spec.loras)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.spec.names, *self.spec.loras)


class ModelNames:
    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self.models = tuple(Model(spec) for spec in specs)
        self._by_name = {name: model for model in self.models for name in model.names}

    def find(self, name: str) -> Model:
        """The model of a public name. Raises ModelNotFound, which lists the known names."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFound(name, self.public_names()) from None

    def public_names(self) -> list[str]:
        """All names, without those of hidden models."""
        return [name for model in self.models if not model.spec.hidden for name in model.names]
