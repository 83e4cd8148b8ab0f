from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree as ET

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from llmserve.cli import plan_report
from llmserve.gpus.device import GIB, Box, Gpu, described
from llmserve.planning.plan import Plan, PlannedReplica, Problem


def replica(
    model: str, devices: tuple[int, ...], weights: float, kv: float, overhead: float, **more: Any
) -> PlannedReplica:
    """A replica by its GiB on each GPU."""
    fields: dict[str, Any] = {
        "number": 0,
        "of": 1,
        "tensor_parallel_size": len(devices),
        "pipeline_parallel_size": 1,
        "tokens": 0,
        "context": 512,
        "measured": True,
    }
    sizes = {"weights": weights, "kv": kv, "overhead": overhead}
    fields |= {kind: int(size * GIB) for kind, size in sizes.items()}
    return PlannedReplica(model, devices=devices, **fields | more)


TWO = Plan(
    described("2xH100"),
    headroom=0.05,
    replicas=(
        replica("llama-8b", (0, 1), 7.5, 50.1, 2.4, tokens=821_344, context=32_768),
        replica(
            "llama-1b",
            (0,),
            *(2.3, 9.6, 1.9),
            tokens=314_560,
            context=131_072,
            measured=False,
            approximate=True,
        ),
        replica("embed", (1,), 0.03, 0, 0.9, measured=False),
    ),
)
LATE = Problem(
    "judge",
    "needs 131.5 GiB on each of 2 GPUs, and the largest pair of equal GPUs has 75.5 GiB on each",
    "tensor_parallel_size: 4",
)


def shown(plan: Plan, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_report.terminal(plan))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_terminal_has_a_letter_a_model_and_a_row_a_replica() -> None:
    assert (
        shown(TWO)
        == """\
GPU                    MEMORY                                          USED
  0  H100 80GB HBM3  79.6 GiB  A██▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▒B▓▓▓▓▒···  73.8 GiB  93%
  1  H100 80GB HBM3  79.6 GiB  A██▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▒C▒·······  60.9 GiB  76%
█ weights  ▓ KV cache  ▒ overhead  · free (5% headroom)  ~ estimate

                       WEIGHTS  KV CACHE  OVERHEAD                  CONTEXT
   MODEL     GPUS  TP  GiB/GPU   GiB/GPU   GiB/GPU    TOKENS     x REQUESTS
A  llama-8b  0,1    2      7.5      50.1       2.4   821,344  32,768 x 25.1
B  llama-1b  0      1      2.3       9.6      ~1.9  ≥314,560  131,072 x 2.4
C  embed     1      1     <0.1         -      ~0.9         -            512"""
    )


def test_problems_wrap_below_with_a_change_that_fits() -> None:
    plan = Plan(described("1xL4"), 0, (), (LATE, Problem("big", "needs more")))
    assert (
        shown(plan)
        == """\
GPU        MEMORY                                                       USED
  0  L4  22.5 GiB  ················································  0.0 GiB  0%
█ weights  ▓ KV cache  ▒ overhead  · free

judge: needs 131.5 GiB on each of 2 GPUs, and the largest pair of equal GPUs has
75.5 GiB on each
  what would fit: tensor_parallel_size: 4

big: needs more
  what would fit: no change was found"""
    )


def test_replicas_pipelines_and_ranges_of_gpus() -> None:
    lines = shown(
        Plan(
            described("8xH100"),
            0,
            (
                replica(
                    "a",
                    (0, 1, 2, 3),
                    *(1, 1, 1),
                    of=2,
                    tensor_parallel_size=2,
                    pipeline_parallel_size=2,
                ),
                replica("a", (4, 6, 7), 1, 1, 1, number=1, of=2),
            ),
        )
    )
    assert "TP x PP" in lines
    assert "A  a/0    0-3      2 x 2" in lines
    assert "A  a/1    4,6,7        3" in lines


@pytest.mark.parametrize("width", [80, 140])
def test_a_large_plan_keeps_to_the_width(width: int) -> None:
    plan = Plan(
        described("64xH100"),
        0.05,
        tuple(
            replica(f"a-model-of-some-length-{i}", (2 * i, 2 * i + 1), 8, 40, 2, tokens=10**7)
            for i in range(30)
        ),
        (LATE,),
    )
    lines = shown(plan, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert sum(line.endswith(("63%", " 0%")) for line in lines) == 64


def test_unknown_model_shows_only_its_share() -> None:
    plan = Plan(
        described("1xL4"),
        0,
        (replica("odd", (0,), 0, 0, 11, context=0, measured=False, known=False),),
    )
    lines = shown(plan).splitlines()
    assert "A░░░" in lines[1]
    assert lines[2] == "█ weights  ▓ KV cache  ▒ overhead  ░ share  · free"
    assert lines[-1].split() == ["A", "odd", "0", "1", "?", "?", "░", "11.0", "?", "?"]
    written = plan_report.document(plan)["replicas"][0]
    assert written["total_bytes"] == 11 * GIB
    assert written["weights_bytes"] is written["max_model_len"] is None


TURNS = Plan(
    described("1xH100"),
    0.05,
    (
        replica("chat", (0,), 15, 30, 3, sleeps=True, host=15 * GIB),
        replica("near", (0,), 5, 8, 2, on_demand=True, sleeps=True, host=5 * GIB),
        replica(
            "far",
            (0,),
            *(30, 35, 4),
            on_demand=True,
            displaces=True,
            measured=False,
            sleeps=True,
            host=30 * GIB,
        ),
    ),
)


def test_displacing_replica_is_drawn_asleep_and_listed_awake() -> None:
    assert (
        shown(TURNS)
        == """\
GPU                    MEMORY                                          USED
  0  H100 80GB HBM3  79.6 GiB  A█████▓▓▓▓▓▓▓▓▓▓▓▓▓▒B█▓▓▓▓▒C▂·····  67.0 GiB  84%
█ weights  ▓ KV cache  ▒ overhead  ▂ asleep  · free (5% headroom)  ~ estimate

                        WEIGHTS  KV CACHE  OVERHEAD             CONTEXT
   MODEL      GPUS  TP  GiB/GPU   GiB/GPU   GiB/GPU  TOKENS  x REQUESTS
A  chat       0      1     15.0      30.0       3.0       -         512
B  near       0      1      5.0       8.0       2.0       -         512
   on demand
C  far        0      1     30.0      35.0      ~4.0       -         512
   on demand"""
    )


def test_document_has_sleeping_replicas() -> None:
    keys = ("on_demand", "displaces", "sleeps", "resident_bytes", "total_bytes", "host_bytes")
    near, far = plan_report.document(TURNS)["replicas"][1:]
    assert [near[key] for key in keys] == [True, False, True, 15 * GIB, 15 * GIB, 5 * GIB]
    assert [far[key] for key in keys] == [True, True, True, 4 * GIB, 69 * GIB, 30 * GIB]


def test_overfull_gpu_shows_a_full_bar_and_its_percentage() -> None:
    plan = Plan(described("1xL4"), 0, (replica("a", (0,), 20, 20, 5),))
    line = shown(plan).splitlines()[1]
    assert "·" not in line
    assert line.endswith("45.0 GiB  200%")


def test_markup_in_names_is_text() -> None:
    assert "A  [red]x[/red]" in shown(
        Plan(described("1xL4"), 0, (replica("[red]x[/red]", (0,), 1, 1, 1),))
    )


def test_a_model_has_one_colour_everywhere() -> None:
    plan = Plan(described("2xL4"), 0, tuple(replica(f"m{i}", (i % 2,), 1, 0, 0) for i in range(12)))
    marks = plan_report.marks(plan)
    assert [mark.letter for mark in marks.values()] == list("ABCDEFGHIJKL")
    assert marks["m0"].color == marks[f"m{len(plan_report.PALETTE)}"].color
    assert len({mark.color for mark in marks.values()}) == len(plan_report.PALETTE)
    for gpu in plan.box:
        parts = plan_report.parts(plan, gpu)
        styles = {str(span.style) for span in plan_report.Bar(parts, marks).text(60).spans}
        for part in parts:
            if part.replica is not None:
                assert f"bold #ffffff on {marks[part.replica.model].color}" in styles


@pytest.mark.parametrize("color", plan_report.PALETTE)
def test_colours_can_be_read_on_white_and_on_black(color: str) -> None:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # as WCAG 2 has it
    assert 1.05 / (luminance + 0.05) >= 4.5
    assert (luminance + 0.05) / 0.05 >= 3


SIZES = st.lists(st.integers(1, 2**40), max_size=40)


@given(SIZES, st.integers(1, 200))
def test_cells_fill_the_width_and_show_every_part_that_fits(sizes: list[int], width: int) -> None:
    counts = plan_report.cells(sizes, width)
    assert len(counts) == len(sizes)
    assert sum(counts) == (width if sizes else 0)
    assert min(counts, default=0) >= 0
    if len(sizes) <= width:
        assert all(counts)
    else:
        hidden = [size for size, count in zip(sizes, counts, strict=True) if not count]
        kept = [size for size, count in zip(sizes, counts, strict=True) if count]
        assert max(hidden) <= min(kept)


@given(SIZES.filter(bool), st.integers(100, 400))
def test_cells_follow_the_sizes(sizes: list[int], width: int) -> None:
    counts = plan_report.cells(sizes, width)
    for size, count in zip(sizes, counts, strict=True):
        exact = size * width / sum(sizes)
        assert count <= exact + 1
        larger = [c for s, c in zip(sizes, counts, strict=True) if s > size]
        assert all(count <= c + 1 for c in larger)


PRINTABLE = st.text(
    st.characters(categories=["L", "N", "P", "S", "M"], include_characters=" "), min_size=1
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    memory = st.integers(GIB, 200 * GIB)
    box: Box = tuple(Gpu(i, draw(PRINTABLE), draw(memory)) for i in range(draw(st.integers(1, 5))))
    some = st.sets(st.integers(0, len(box) - 1), min_size=1).map(
        lambda chosen: tuple(sorted(chosen))
    )
    size = st.floats(0, 40)
    replicas = st.builds(
        replica,
        PRINTABLE,
        some,
        *(size, size, size),
        tokens=st.integers(0, 10**7),
        context=st.integers(1, 10**6),
        measured=st.booleans(),
        approximate=st.booleans(),
        known=st.booleans(),
        on_demand=st.booleans(),
        displaces=st.booleans(),
    )
    problems = st.builds(Problem, PRINTABLE, PRINTABLE, st.none() | PRINTABLE)
    return Plan(
        box,
        draw(st.sampled_from([0, 0.05, 0.125])),
        tuple(draw(st.lists(replicas, max_size=8))),
        tuple(draw(st.lists(problems, max_size=2))),
    )


@given(plans(), st.integers(1, 120))
def test_any_bar_is_as_wide_as_its_cells(plan: Plan, width: int) -> None:
    for gpu in plan.box:
        parts = plan_report.parts(plan, gpu)
        assert sum(part.size for part in parts) == max(gpu.memory, plan.used(gpu.index))
        bar = plan_report.Bar(parts, plan_report.marks(plan)).text(width)
        assert bar.cell_len == width
        if len(parts) <= width:
            whole = [r for r in plan.on(gpu.index) if r.resident]
            letters = [plan_report.marks(plan)[r.model].letter for r in whole]
            assert [c for c in bar.plain if c.isalpha()] == letters


@given(plans())
def test_the_document_survives_json_and_adds_up(plan: Plan) -> None:
    document = plan_report.document(plan)
    assert orjson.loads(orjson.dumps(document)) == document
    for gpu in document["gpus"]:
        on = [r for r in document["replicas"] if gpu["index"] in r["gpus"]]
        assert [r["name"] for r in on] == gpu["replicas"]
        assert sum(r["resident_bytes"] for r in on) == gpu["used_bytes"]
        assert gpu["used_bytes"] + gpu["free_bytes"] == gpu["memory_bytes"]
    for one, replica in zip(document["replicas"], plan.replicas, strict=True):
        sizes = [one[f"{kind}_bytes"] for kind in ("weights", "kv_cache", "overhead")]
        if replica.known:
            assert sum(sizes) == one["total_bytes"]
        else:
            assert sizes == [None, None, None]
    assert [p["model"] for p in document["problems"]] == [p.model for p in plan.problems]


def test_the_document_of_a_plan() -> None:
    plan = Plan(described("1xH100"), 0.05, TWO.replicas[1:2], (LATE,))
    used = sum(int(size * GIB) for size in (2.3, 9.6, 1.9))
    assert plan_report.document(plan) == {
        "headroom_fraction": 0.05,
        "gpus": [
            {
                "index": 0,
                "name": "NVIDIA H100 80GB HBM3",
                "uuid": None,
                "memory_bytes": 81_559 * 2**20,
                "used_bytes": used,
                "free_bytes": 81_559 * 2**20 - used,
                "replicas": ["llama-1b"],
            }
        ],
        "replicas": [
            {
                "name": "llama-1b",
                "model": "llama-1b",
                "number": 0,
                "replicas": 1,
                "gpus": [0],
                "tensor_parallel_size": 1,
                "pipeline_parallel_size": 1,
                "weights_bytes": int(2.3 * GIB),
                "kv_cache_bytes": int(9.6 * GIB),
                "overhead_bytes": int(1.9 * GIB),
                "total_bytes": used,
                "resident_bytes": used,
                "on_demand": False,
                "pinned": False,
                "displaces": False,
                "sleeps": False,
                "host_bytes": 0,
                "overhead_measured": False,
                "kv_cache_tokens": 314_560,
                "kv_cache_tokens_at_least": True,
                "max_model_len": 131_072,
                "full_length_requests": 2.4,
            }
        ],
        "problems": [
            {"model": "judge", "message": LATE.message, "remedy": "tensor_parallel_size: 4"}
        ],
    }


@given(plans())
def test_svg_is_xml_with_the_text_of_the_terminal(plan: Plan) -> None:
    picture = ET.fromstring(plan_report.svg(plan))
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = re.sub(r"\s", "", "".join(picture.itertext()))
    for line in shown(plan, 100).splitlines():
        assert re.sub(r"\s", "", line) in drawn


def test_svg_has_names_as_they_are_and_the_colours_of_models() -> None:
    name = """a<b>&"c'"""
    gpus = (Gpu(0, name, 24 * GIB),)
    plan = Plan(gpus, 0, (replica(name, (0,), 10, 5, 1, measured=False),), (LATE,))
    written = plan_report.svg(plan)
    assert plan_report.marks(plan)[name].color in written
    drawn = "".join(ET.fromstring(written).itertext()).replace("\xa0", " ")
    for fact in (f"Memory plan: 1 x {name}", name, "10.0", "5.0", "~1.0", "16.0 GiB", "judge"):
        assert fact in drawn


def test_problem_of_broken_files_has_no_change_that_fits() -> None:
    lines = plan_report._problem(Problem("m", "cannot be loaded: cut short", key="model"))
    assert [str(line) for line in lines] == ["m: cannot be loaded: cut short"]
