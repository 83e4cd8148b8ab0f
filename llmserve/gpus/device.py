"""GPUs as values: detected on this machine, or described. Nothing here uses a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from llmserve.errors import ConfigError, nearest
from llmserve.registry import yaml_positions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

GIB = 2**30
_MIB = 2**20
GPU_LIMIT = 1024  # in one box


@dataclass(frozen=True)
class Gpu:
    index: int  # as CUDA counts, within CUDA_VISIBLE_DEVICES
    name: str  # as the driver reports it: "NVIDIA H100 80GB HBM3"
    memory: int  # bytes in all
    capability: tuple[int, int] | None = None  # CUDA compute capability, (9, 0)
    uuid: str | None = None  # None: described, not detected
    island: int = 0  # GPUs of one island are linked to each other (NVLink)

    @property
    def kind(self) -> tuple[str, int, tuple[int, int] | None]:
        """Return what the GPUs of one tensor parallel group have in common."""
        return self.name, self.memory, self.capability


Box = tuple[Gpu, ...]


@dataclass(frozen=True)
class _Model:
    """A GPU as NVML reports it. Source of capabilities: developer.nvidia.com/cuda/gpus."""

    name: str
    mib: int
    capability: tuple[int, int]
    linked: bool = False  # through NVSwitch, all of a box


_KNOWN = {
    "B200": _Model("NVIDIA B200", 183_359, (10, 0), linked=True),
    "H200": _Model("NVIDIA H200", 143_771, (9, 0), linked=True),
    "H100": _Model("NVIDIA H100 80GB HBM3", 81_559, (9, 0), linked=True),
    "H100-80G": _Model("NVIDIA H100 80GB HBM3", 81_559, (9, 0), linked=True),
    "H100-PCIE": _Model("NVIDIA H100 PCIe", 81_559, (9, 0)),
    "H20": _Model("NVIDIA H20", 97_871, (9, 0), linked=True),
    "A100-80G": _Model("NVIDIA A100-SXM4-80GB", 81_920, (8, 0), linked=True),
    "A100-40G": _Model("NVIDIA A100-SXM4-40GB", 40_960, (8, 0), linked=True),
    "A100": _Model("NVIDIA A100-SXM4-80GB", 81_920, (8, 0), linked=True),
    "L40S": _Model("NVIDIA L40S", 46_068, (8, 9)),
    "L40": _Model("NVIDIA L40", 46_068, (8, 9)),
    "L4": _Model("NVIDIA L4", 23_034, (8, 9)),
    "A40": _Model("NVIDIA A40", 46_068, (8, 6)),
    "A10": _Model("NVIDIA A10", 23_028, (8, 6)),
    "A6000": _Model("NVIDIA RTX A6000", 49_140, (8, 6)),
    "RTX5090": _Model("NVIDIA GeForce RTX 5090", 32_607, (12, 0)),
    "RTX4090": _Model("NVIDIA GeForce RTX 4090", 24_564, (8, 9)),
    "RTX3090": _Model("NVIDIA GeForce RTX 3090", 24_576, (8, 6)),
    "V100-32G": _Model("Tesla V100-SXM2-32GB", 32_768, (7, 0), linked=True),
    "V100-16G": _Model("Tesla V100-SXM2-16GB", 16_384, (7, 0), linked=True),
    "T4": _Model("Tesla T4", 15_360, (7, 5)),
}
_TERM = re.compile(r"(?:(?P<count>\d+)\s*[x*]\s*)?(?P<name>[A-Za-z][\w.-]*)$")
_SIZED = re.compile(r"(?P<name>.+?)-(?P<size>\d+(?:\.\d+)?)(?:G|GB|GiB)$", re.IGNORECASE)


def described(text: str) -> Box:
    """Return the GPUs of `8xH100-80G` or `4xA100-40G,2xL40S`.

    A known name has the memory that its driver reports. Any other name contains its memory, as in
    `2xMINE-24G`, and its compute capability is unknown. Raises ConfigError.
    """
    gpus: list[Gpu] = []
    for island, term in enumerate(text.split(",")):
        found = _TERM.match(term.strip())
        if found is None:
            raise ConfigError(
                [f"invalid GPU {term.strip()!r}; expected a list such as 8xH100-80G,2xL4"]
            )
        for _ in range(_counted(int(found["count"] or 1), len(gpus))):
            gpus.append(_gpu(found["name"], None, len(gpus), island))
    return tuple(gpus)


def _counted(count: int, before: int) -> int:
    if not 0 < count + before <= GPU_LIMIT or not count:
        raise ConfigError([f"invalid number of GPUs {count}; a box has 1 to {GPU_LIMIT}"])
    return count


def _gpu(name: str, memory: int | None, index: int, island: int) -> Gpu:
    """Return a GPU by its name; unlinked GPUs have an island each. Raises ConfigError."""
    model = _KNOWN.get(name.upper().replace(" ", ""))
    if model is not None:
        alone = island if model.linked else GPU_LIMIT + index
        known = memory or model.mib * _MIB
        return Gpu(index, model.name, known, model.capability, island=alone)
    size = memory or _own_size(name)
    if not size:
        near = nearest(name, _KNOWN)
        raise ConfigError(
            [
                f"unknown GPU {name}"
                + (f"; nearest: {near}" if near else "")
                + f"; add its memory, as in {name}-24G"
            ]
        )
    return Gpu(index, name, size, island=GPU_LIMIT + index)


def _own_size(name: str) -> int | None:
    """Return the bytes in a name such as MINE-24G."""
    sized = _SIZED.match(name)
    return int(float(sized["size"]) * GIB) if sized else None


class _Described(BaseModel):
    """A line of a box file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    count: Annotated[int, Field(strict=True, ge=1, le=GPU_LIMIT)] = 1
    memory: ByteSize | None = None
    linked: bool | None = None  # None: as this kind of GPU usually is


class _BoxFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gpus: Annotated[list[_Described], Field(min_length=1)]


def from_file(file: Path) -> Box:
    """Return the GPUs of a YAML file: `gpus: [{name: H100, count: 4, memory: 80GiB, linked: true}]`.

    Raises ConfigError with every problem of the file.
    """
    document = yaml_positions.read(file)
    try:
        lines = [] if document.problems else _BoxFile.model_validate(document.value).gpus
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            document.problem(detail["loc"], _plain(detail))
        lines = []
    for at, line in enumerate(lines):
        try:
            _gpu(line.name, line.memory, 0, 0)
        except ConfigError as error:
            document.problem(("gpus", at, "name"), error.message)
    if document.problems:
        raise ConfigError([problem.within(file.name) for problem in sorted(document.problems)])
    return tuple(_laid_out(lines))


def _plain(detail: ErrorDetails) -> str:
    """Return the message of a pydantic error."""
    if detail["type"] != "extra_forbidden":
        return detail["msg"][:1].lower() + detail["msg"][1:]
    known = _Described.model_fields if len(detail["loc"]) > 1 else _BoxFile.model_fields
    near = nearest(str(detail["loc"][-1]), known)
    return "unknown key; " + (f"nearest: {near}" if near else f"known: {', '.join(known)}")


def _laid_out(lines: Sequence[_Described]) -> Iterable[Gpu]:
    index = 0
    for island, line in enumerate(lines):
        for _ in range(_counted(line.count, index)):
            gpu = _gpu(line.name, line.memory, index, island)
            if line.linked is not None:
                gpu = Gpu(**vars(gpu) | {"island": island if line.linked else GPU_LIMIT + index})
            yield gpu
            index += 1


def short_name(name: str) -> str:
    """Return the name without the vendor: "H100 80GB HBM3"."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ").removeprefix("Tesla ")


def listed(box: Box) -> str:
    """Return a short list of the GPUs: "4 x H100 80GB HBM3, 2 x L4"."""
    counts: dict[str, int] = {}
    for gpu in box:
        counts[short_name(gpu.name)] = counts.get(short_name(gpu.name), 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no GPU"


def find(box: Box, device: int | str) -> Gpu | None:
    """Return the GPU of an index, a UUID or the beginning of a UUID."""
    for gpu in box:
        if gpu.index == device or (
            isinstance(device, str) and gpu.uuid is not None and gpu.uuid.startswith(device)
        ):
            return gpu
    return None


def gib(size: float, digits: int = 1) -> str:
    return f"{size / GIB:.{digits}f} GiB"


def apart(one: int, other: int) -> tuple[str, str]:
    """Return two different sizes with enough digits to show the difference."""
    shown = [(gib(one, digits), gib(other, digits)) for digits in range(1, 7)]
    return next((pair for pair in shown if pair[0] != pair[1]), shown[-1])


def amount(size: int) -> tuple[str, int]:
    """Return a size, rounded up to a tenth of a GiB, as text of the registry and in bytes."""
    tenths = math.ceil(size * 10 / GIB)
    return f"{tenths / 10:g}GiB", tenths * GIB // 10 + 1
