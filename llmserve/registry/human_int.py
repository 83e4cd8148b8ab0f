"""Integers in the notation of vLLM's command line."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit.upper(): 2 ** (10 * (i + 1)) for i, unit in enumerate("kmgt")}


def human_int(value: object) -> object:
    """The integer of `32k` (32,000), `32K` (32,768) or `auto` (-1); other values unchanged.

    Source: vllm/utils/argparse_utils.py, human_readable_int_or_auto.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004  # pydantic catches ValueError
    if not isinstance(value, str):
        return value
    if value == "auto":
        return -1
    number, unit = value[:-1], value[-1:]
    if unit in _UNITS and number.replace(".", "", 1).isdigit():
        return int(float(number) * _UNITS[unit])
    return value


HumanInt = Annotated[int, BeforeValidator(human_int)]
