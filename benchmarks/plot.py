"""Distributions as curves: the share of values that are at most x. Needs matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_SHOWN = 0.99  # of the values: one straggler would flatten the rest


def need_matplotlib() -> None:
    """Raises SystemExit with what to do where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def draw(panels: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """A panel for each figure, in it a curve for each side."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3), sharey=True, layout="constrained"
    )
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for number, (side, values) in enumerate(curves.items()):
            _curve(axis, side, sorted(values), dashed=number > 0)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of values")
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _curve(axis: Any, side: str, values: Sequence[float], *, dashed: bool) -> None:
    shown = values[: max(1, round(len(values) * _SHOWN))]
    shares = [(place + 1) / len(values) for place in range(len(shown))]
    axis.step(shown, shares, where="post", label=side, linestyle="--" if dashed else "-")
