"""Pictures for the HTML page: charts as inline SVG that follow the page's colours, image grids as data URIs.

Charts are drawn with placeholder colours that become CSS variables, so one picture serves light, dark and print.
The same rows give the same bytes: fixed hash salt, no dates, no style of the user's matplotlib.
"""

from __future__ import annotations

import base64
import io
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from distillery.report.load import Row
from distillery.report.table import Entry, spread

COLOURS = 8  # series colours in the style sheet, --s1 to --s8; --s0 is for baselines
INK, MUTED, RULE = "#0000f0", "#0000f1", "#0000f2"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "distillery",
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}


@dataclass(frozen=True)
class Look:
    """How one method is drawn everywhere: `number` of the CSS variable --s<number>, and the dash pattern."""

    number: int
    dash: str  # a matplotlib line style

    @property
    def line(self) -> str:
        """The dash pattern's name in the style sheet."""
        return {"-": "solid", "--": "dash", "-.": "dash", ":": "dot"}[self.dash]

    @property
    def colour(self) -> str:
        """The placeholder colour in the drawing."""
        return f"#0000a{self.number}"


@dataclass(frozen=True)
class Picture:
    """An image grid inside the page."""

    uri: str
    width: int
    height: int


def looks(methods: Mapping[str, bool]) -> dict[str, Look]:
    """One look per method name (value: is a baseline), stable because names are sorted."""
    others = sorted(m for m, baseline in methods.items() if not baseline)
    dashes = ("-", "--", "-.", ":")
    found = {m: Look(1 + i % COLOURS, dashes[i // COLOURS % 4]) for i, m in enumerate(others)}
    baselines = sorted(
        (m for m, baseline in methods.items() if baseline), key=lambda m: (not m.startswith("random"), m)
    )
    return found | {m: Look(0, ("--", ":", "-.", "-")[i % 4]) for i, m in enumerate(baselines)}


def curves(entries: Sequence[Entry], look: Mapping[str, Look], name: str) -> Markup:
    """Accuracy against epoch, mean over seeds with a band of one std."""

    def paint(axes: Axes) -> None:
        for entry in reversed(entries):
            epochs, mean, std = average_curve(entry.rows)
            style = look[entry.method]
            lone = "o" if len(epochs) == 1 else ""
            axes.plot(epochs, mean, color=style.colour, linestyle=style.dash, marker=lone, markersize=4)
            if any(std):
                low = [m - s for m, s in zip(mean, std, strict=True)]
                high = [m + s for m, s in zip(mean, std, strict=True)]
                axes.fill_between(epochs, low, high, color=style.colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.margins(x=0.01)

    return _draw(paint, f"Accuracy against epoch. {_said(entries)}", name)


def against_ipc(entries: Sequence[Entry], look: Mapping[str, Look], name: str) -> Markup:
    """Last accuracy against IPC, one line per method with std bars, and the teacher's accuracy as a ceiling."""
    ipcs = sorted({e.setting.ipc for e in entries})
    ceiling = entries[0].setting.teacher_acc

    def paint(axes: Axes) -> None:
        for method in sorted({e.method for e in entries}):
            line = sorted((e for e in entries if e.method == method), key=lambda e: e.setting.ipc)
            style = look[method]
            at, means = [e.setting.ipc for e in line], [e.mean for e in line]
            axes.plot(at, means, color=style.colour, linestyle=style.dash, marker="o", markersize=4)
            axes.errorbar(at, means, yerr=[e.std or 0.0 for e in line], fmt="none", ecolor=style.colour, elinewidth=1.2)
        axes.axhline(ceiling, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"teacher {ceiling:.1f}",
            (1, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color=MUTED,
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ipcs))
        axes.xaxis.set_major_formatter(FixedFormatter([str(ipc) for ipc in ipcs]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.06)
        axes.set_xlabel("images per class (log scale)")
        axes.set_ylabel("accuracy (%)")

    said = "; ".join(f"IPC {ipc}: {_said([e for e in entries if e.setting.ipc == ipc])}" for ipc in ipcs)
    return _draw(paint, f"Accuracy against images per class. {said} Teacher {ceiling:.1f} %.", name)


def average_curve(rows: Sequence[Row]) -> tuple[list[int], list[float], list[float]]:
    """Epochs that every row has, mean accuracy and std (0 for one row) at each."""
    points = [dict(row.curve) for row in rows if row.curve]
    epochs = sorted(set.intersection(*map(set, points))) if points else []
    values = [[p[e] for p in points] for e in epochs]
    return epochs, [statistics.fmean(v) for v in values], [spread(v) or 0.0 for v in values]


def picture(path: Path, most_bytes: int) -> Picture:
    """A preview as a data URI: the file itself if that fits, else at falling quality, then smaller."""
    data = path.read_bytes()
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    if len(data) <= most_bytes:
        return Picture(_uri(data, "png"), image.width, image.height)
    shown = image
    while shown.width * shown.height > 9 * most_bytes:  # below a ninth of a byte per pixel no quality fits
        shown = _smaller(shown)
    while True:
        for quality in (92, 75, 50):
            data = _webp(shown, quality)
            if len(data) <= most_bytes or shown.width < 64:
                return Picture(_uri(data, "webp"), image.width, image.height)
        shown = _smaller(shown)


def matrix(shares: Tensor) -> Picture:
    """A confusion matrix as a picture of one pixel per cell, the more opaque the larger its percentage [C, C]."""
    alpha = (255 * (shares / 100).clamp(0, 1).sqrt()).round().to(torch.uint8)  # the root: mistakes are small numbers
    colour = torch.tensor([0x4B, 0x8D, 0xF0], dtype=torch.uint8).expand(*alpha.shape, 3)
    image = Image.fromarray(torch.cat([colour, alpha[..., None]], 2).numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Picture(_uri(buffer.getvalue(), "png"), image.width, image.height)


def _smaller(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _said(entries: Sequence[Entry]) -> str:
    return ", ".join(f"{e.method} {e.mean:.1f} %" for e in entries) + "."


def _draw(paint: Callable[[Axes], None], alt: str, name: str) -> Markup:
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    return Markup(_inline(buffer.getvalue(), str(escape(alt)), name))  # noqa: S704 - drawn here, and alt is escaped


def _inline(svg: str, alt: str, name: str) -> str:
    """The drawing as part of the page: no prolog, CSS colours and fonts, ids unique among charts."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box, "matplotlib wrote an SVG without a viewBox"
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)  # hundredths of a point are enough
    body = re.sub(r"#0000a(\d)", r"var(--s\1)", body)
    for placeholder, variable in VARIABLES.items():
        body = body.replace(placeholder, variable)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{alt}">{body}'
