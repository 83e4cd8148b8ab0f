"""A plan from the models' own files."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.checkpoint import shape
from llmserve.errors import ShapeUnknown
from llmserve.gpus.device import GIB, described
from llmserve.planning import survey
from llmserve.planning.measurements import Measured
from llmserve.registry.spec import Config, ModelSpec
from tests.unit.shapes import LLAMA_8B
from tests.unit.test_files import write_tensors
from tests.unit.test_shape import LLAMA

if TYPE_CHECKING:
    from llmserve.checkpoint.shape import Shape

H100 = described("H100")


def config(*specs: ModelSpec) -> Config:
    return Config(file=Path("models.yaml"), models=specs)


def llama(folder: Path, **more: Any) -> ModelSpec:
    """A folder with the config of an 8B Llama and the header of one small tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_tensors(folder / "model.safetensors", {"model.embed_tokens.weight": ("BF16", (64, 64))})
    return ModelSpec(name=folder.name, model=str(folder), **more)


def test_plan_uses_the_models_files(tmp_path: Path) -> None:
    plan = survey.plan(config(llama(tmp_path / "m")), H100, Measured(tmp_path / "none"))
    (replica,) = plan.replicas
    assert plan.box == H100
    assert replica.context == 131_072
    assert replica.weights == 64 * 64 * 2
    assert not replica.measured


def test_the_registry_s_headroom_is_left_free(tmp_path: Path) -> None:
    registry = config(llama(tmp_path / "m"))
    server = registry.server.model_copy(update={"gpu_headroom": 0.5})
    plan = survey.plan(registry.model_copy(update={"server": server}), H100, Measured(tmp_path))
    assert plan.headroom == 0.5
    assert plan.used(0) <= H100[0].memory / 2


def test_what_was_measured_is_planned_with(tmp_path: Path) -> None:
    registry = config(llama(tmp_path / "m"))
    kept = Measured(tmp_path / "memory")
    (first,) = survey.plan(registry, H100, kept).replicas
    kept.keep(first.fingerprint, 7 * GIB, {})
    (again,) = survey.plan(registry, H100, kept).replicas
    assert (first.measured, again.measured, again.overhead) == (False, True, 7 * GIB)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": '{"architectures": ["LlamaForCausalLM"]}'},
        {"config.json": json.dumps(LLAMA), "model.safetensors": "no header"},
        {"config.json": json.dumps(LLAMA | {"num_hidden_layers": "many"})},
    ],
    ids=["none", "broken", "list", "short", "tensors", "text"],
)
def test_plan_of_unreadable_model_has_a_problem(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "odd").mkdir()
    for name, text in files.items():
        (tmp_path / "odd" / name).write_text(text)
    odd = ModelSpec(name="odd", model=str(tmp_path / "odd"))
    plan = survey.plan(config(odd, llama(tmp_path / "m")), H100, Measured(tmp_path / "none"))
    (problem,) = plan.problems
    assert problem.model == "odd"
    assert problem.message.startswith(("cannot be loaded: ", "cannot be placed, its size "))
    assert "\n" not in problem.message
    assert [replica.model for replica in plan.replicas] == ["m"]


def test_models_are_read_side_by_side_and_stay_with_their_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = threading.Barrier(4)  # nobody is read before all are begun

    def read(spec: ModelSpec, *, hub: bool) -> Shape:
        assert hub
        together.wait(timeout=60)
        if spec.name == "m2":
            raise ShapeUnknown("m2 is away")
        return LLAMA_8B

    monkeypatch.setattr(shape, "read", read)
    specs = [ModelSpec(name=f"m{n}", model="/m", concurrency=n + 1) for n in range(4)]
    plan = survey.plan(config(*specs), described("4xH100"), Measured(tmp_path))
    assert [replica.model for replica in plan.replicas] == ["m0", "m1", "m3"]
    (problem,) = plan.problems
    assert (problem.model, "m2 is away" in problem.message) == ("m2", True)
