"""The source that files of ours were written for is the source that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import vllm_source
from tests.contract.vllm_source import Pin, fingerprint, pins

ROOT = Path(__file__).parents[2]
PINS = tuple(pins())


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: f"{pin.file} {pin.target}")
def test_source_is_what_our_file_was_written_for(pin: Pin) -> None:
    assert fingerprint(pin.target) == pin.fingerprint, (
        f"{pin.target} is not what {pin.file} was written for; read both, "
        "then enter the new hash in tests/contract/vllm_source.toml"
    )


def test_pins_name_files_of_ours() -> None:
    assert len(PINS) > 100
    assert not [pin.file for pin in PINS if not (ROOT / pin.file).is_file()]


@pytest.mark.parametrize(
    "target", ["vllm.nothing:f", "nothing_at_all:f", "vllm.envs:nothing", "vllm.v1.engine:f.g"]
)
def test_definition_that_is_missing_is_a_lookup_error(target: str) -> None:
    with pytest.raises(LookupError, match="is not in"):
        fingerprint(target)


BEFORE = '''
def f(a):
    """What it does."""
    return a + 1  # one more
'''


@pytest.mark.parametrize(
    ("after", "is_same"),
    [
        ('def f(a):\n    """Other words."""\n\n    return (a + 1)', True),
        ('def f(a):\n    """What it does."""\n    return a + 2', False),
        ('def f(a, b=None):\n    """What it does."""\n    return a + 1', False),
    ],
)
def test_fingerprint_is_that_of_code_alone(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_same: bool
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("pinned_before", BEFORE), ("pinned_after", after)):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text(text, encoding="utf-8")
    before, now = fingerprint("pinned_before:f"), fingerprint("pinned_after:f")
    vllm_source._tree.cache_clear()
    assert (before == now) is is_same
