# SPDX-License-Identifier: Apache-2.0
"""Draws ``docs/images`` from ``benchmarks/results``; `benchmarks.report` calls it where there is matplotlib.

Each picture holds in its metadata which contents of which files it was drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.summary import PREFILL, ROOT, SWEEP, TABLE, TIMELINE, cells, digests, load, over_floor, speedups

IMAGES = ROOT / "docs" / "images"
# The colours of Okabe and Ito, which differ for colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555",
)
LINES = {"cupy_moe": (BLUE, "o", "cupy_moe"), "vllm": (ORANGE, "s", "vLLM")}
OTHERS = ((GREEN, "^"), (PURPLE, "v"), (SKY, "D"))
"""Further backends of cupy_moe."""
PARTS = {
    "gemm1": BLUE, "gemm2": SKY, "activation": YELLOW, "quantize": ORANGE, "route": PURPLE, "combine": GREEN,
}
STYLE = {
    "font.size": 9.0, "axes.titlesize": 9.0, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "figure.constrained_layout.use": True,
}


def _named(shape: tuple[int, ...]) -> str:
    return "({}, {}, {}, {})".format(*shape)


def draw_speedup(figure: Figure) -> None:
    """A map of the cells, one panel for each scheme: time of vLLM over that of cupy_moe."""
    schemes = {scheme: speedups(cells(TABLE, PREFILL, scheme=scheme)) for scheme in ("tensor", "token")}
    schemes = {scheme: of for scheme, of in schemes.items() if of}
    shapes = list(dict.fromkeys(key[:4] for of in schemes.values() for key in of))
    tokens = sorted({key[4] for of in schemes.values() for key in of})
    furthest = max(abs(math.log2(ratio)) for of in schemes.values() for ratio in of.values())
    norm = TwoSlopeNorm(0.0, -furthest, furthest)
    colours = matplotlib.colormaps["RdBu"]
    figure.set_size_inches(1.9 + 0.5 * len(tokens), 0.6 + 1.75 * len(schemes))
    panels = figure.subplots(len(schemes), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (scheme, of) in zip(panels, schemes.items(), strict=True):
        for y, shape in enumerate(shapes):
            for x, count in enumerate(tokens):
                ratio = of.get((*shape, count))
                if ratio is None:
                    continue
                colour = colours(norm(math.log2(ratio)))
                panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
                ink = "black" if 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2] > 0.5 else "white"
                panel.text(x, y, f"{ratio:.2f}", ha="center", va="center", color=ink, fontsize=8)
        panel.set(xlim=(-0.5, len(tokens) - 0.5), ylim=(len(shapes) - 0.5, -0.5))
        panel.set_xticks(range(len(tokens)), [str(count) for count in tokens])
        panel.set_yticks(range(len(shapes)), [_named(shape) for shape in shapes])
        panel.set_title(f"scales per {scheme}", loc="left")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[-1].set_xlabel("tokens M, by layer (E, topk, K, N)")
    scale = matplotlib.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(scale, ax=panels, aspect=30, pad=0.02)
    steps = (0.4, 0.5, 0.7, 1.0, 1.4, 2.0, 2.5)
    ticks = [value for value in steps if abs(math.log2(value)) <= furthest]
    bar.set_ticks([math.log2(value) for value in ticks], labels=[f"{value:.1f}" for value in ticks])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    figure.suptitle("Time of vLLM over that of cupy_moe: above 1 cupy_moe is faster", fontsize=10)


def draw_floor(figure: Figure) -> None:
    """A panel for each layer: time over the floor against M."""
    of = cells(TABLE, PREFILL, SWEEP)
    names = dict.fromkeys(name for cell in of.values() for name in cell if name != "torch")
    others = iter(OTHERS)
    looks = {name: LINES.get(name) or (*next(others), name) for name in names}
    shapes = list(dict.fromkeys(key[:4] for key in of))
    figure.set_size_inches(2.1 * len(shapes), 2.7)
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        for name, (colour, marker, label) in looks.items():
            points = sorted((key[4], ratio) for key, ratio in over_floor(of, name).items() if key[:4] == shape)
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, lw=1.4, label=label)
        _log_tokens(panel, [key[4] for key in of])
        panel.set_title(_named(shape))
        panel.grid(axis="y", color="#dddddd", lw=0.6)
    panels[0].set_yscale("log", base=2)
    panels[0].set_yticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
    ratios = [ratio for name in looks for ratio in over_floor(of, name).values()]
    panels[0].set_ylim(min(1.0, *ratios), 1.1 * max(ratios))
    panels[0].set_ylabel("time over the floor")
    panels[0].legend(loc="upper right")
    figure.supxlabel("tokens M, by layer (E, topk, K, N)", fontsize=9)


def _log_tokens(panel: Axes, tokens: list[int]) -> None:
    panel.set_xscale("log", base=2)
    ticks = [1 << power for power in range(0, max(tokens).bit_length(), 3)]
    panel.set_xticks(ticks, [f"{count // 1024}k" if count >= 1024 else str(count) for count in ticks])
    panel.minorticks_off()


def draw_parts(figure: Figure) -> None:
    """A panel for each layer and scheme, a bar for each M: shares of the kernels' time, its sum on top."""
    records = load(TIMELINE)["records"]
    shapes = list(dict.fromkeys(tuple(record["shape"]) for record in records))
    schemes = list(dict.fromkeys(record["scheme"] for record in records))
    figure.set_size_inches(2.1 * len(shapes), 0.7 + 1.9 * len(schemes))
    panels = figure.subplots(len(schemes), len(shapes), sharex=True, sharey=True, squeeze=False)
    for row, scheme in zip(panels, schemes, strict=True):
        for panel, shape in zip(row, shapes, strict=True):
            chosen = [record for record in records if (tuple(record["shape"]), record["scheme"]) == (shape, scheme)]
            _stack(panel, chosen)
        row[0].set_ylabel(f"scales per {scheme}\nshare of the time")
    for panel, shape in zip(panels[0], shapes, strict=True):
        panel.set_title(_named(shape), pad=14)
    figure.supxlabel("tokens M, by layer (E, topk, K, N); above the bars the sum in us", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")


def _stack(panel: Axes, records: list[dict[str, Any]]) -> None:
    sums = [sum(record["parts"].values()) for record in records]
    places, below = range(len(records)), [0.0] * len(records)
    for part, colour in PARTS.items():
        shares = [100 * record["parts"].get(part, 0.0) / total for record, total in zip(records, sums, strict=True)]
        panel.bar(places, shares, bottom=below, color=colour, width=0.8, edgecolor="white", lw=0.5, label=part)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    for place, total in zip(places, sums, strict=True):
        panel.text(place, 101, f"{total:.0f}", ha="center", va="bottom", fontsize=8, color=GREY)
    panel.set_xticks(list(places), [str(record["M"]) for record in records])
    panel.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    panel.set_ylim(0, 100)
    panel.tick_params(axis="x", length=0)


PLOTS: dict[str, tuple[Callable[[Figure], None], tuple[str, ...]]] = {
    "speedup.png": (draw_speedup, (TABLE, PREFILL)),
    "floor.png": (draw_floor, (TABLE, PREFILL, SWEEP)),
    "parts.png": (draw_parts, (TIMELINE,)),
}


def draw_all(folder: Path = IMAGES) -> None:
    """Draw every plot into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, sources) in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(dpi=120)
            draw(figure)
            metadata = {"Source": digests(sources), "Software": None}
            figure.savefig(folder / name, metadata=metadata, pil_kwargs={"optimize": True})
