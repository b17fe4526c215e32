"""The figures of `medusa-chat bench --plot`, drawn with matplotlib from the result that is printed too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.terminal.reports.charts import INK, MIDDLE, SOFT, label, supported_kinds
from medusa_chat.terminal.theme import HEAD_COLOURS

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, Any]

WIDTH = 9.0  # inches; at 150 dots an inch still readable where a README shows it at half of that
PARTS = {
    "forward": "backbone's forward",
    "heads": "heads, candidates",
    "acceptance": "acceptance",
    "commit": "commit",
    "rest": "the rest",
}


def check_folder(folder: Path | None) -> None:
    """Raise UserError if no figure could be drawn there in the end: to be called before the long work."""
    if folder is None:
        return
    supported_kinds()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--plot {folder}: that is a file; --plot takes a folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--plot {folder}: there is no folder {folder.parent}")


def plot_bench(result: Figures, folder: Path) -> list[Path]:
    """Draw what the result has: replies.png, step_cost.png, step_parts.png.

    Returns:
        the files written. Raises OSError if the folder or a file cannot be.
    """
    folder.mkdir(exist_ok=True)
    measured = list(_measured(result))
    figures: dict[str, Any] = {}
    if result["modes"]:
        figures["replies"] = _replies(result["modes"])
    if any(model["steps"] for _, model in measured):
        figures["step_cost"] = _step_cost(measured)
    if any(model["parts"] for _, model in measured):
        figures["step_parts"] = _step_parts(measured)
    files = []
    for name, figure in figures.items():
        figure.text(
            0.995, 0.01, _caption(result), ha="right", va="bottom", fontsize=7, color=MIDDLE
        )
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _measured(result: Figures) -> Iterator[tuple[str, Figures]]:
    """The models whose steps were measured, by name."""
    if result["modes"]:
        yield result["model"], result
    yield from result.get("shapes", {}).items()


def _caption(result: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}; {versions}; {result['date'][:10]}"


def _figure(height: float) -> Any:
    """A Figure by itself, without pyplot: no window and no global state. Its lowest line is the caption's."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    caption = 0.25 / height
    return Figure(
        figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, caption, 1, 1 - caption))
    )


def _replies(modes: Mapping[str, Figures]) -> Any:
    """Acceptance length and speedup as bars, by category and mode."""
    names = [*next(iter(modes.values()))["categories"], "all"]
    figure = _figure(1.6 + 0.22 * len(names) * (len(modes) + 1))
    left, right = figure.subplots(1, 2, sharey=True)
    bar = 0.8 / len(modes)
    for index, (mode, figures) in enumerate(modes.items()):
        rows = [figures["categories"].get(name, {}) if name != "all" else figures for name in names]
        places = [row + (index - (len(modes) - 1) / 2) * bar for row in range(len(names))]
        colour = HEAD_COLOURS[index % len(HEAD_COLOURS)]
        for axes, key, form in ((left, "acceptance_length", "%.2f"), (right, "speedup", "%.2fx")):
            drawn = axes.barh(
                places, [row.get(key) or 0.0 for row in rows], bar * 0.92, color=colour, label=mode
            )
            axes.bar_label(drawn, fmt=form, padding=3, fontsize=8, color=INK)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    label(left, "Acceptance length", "tokens a step", "")
    label(right, "Speedup over our own vanilla decoding", "times", "")
    for axes in (left, right):
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(modes),
        frameon=False,
    )
    return figure


def _step_cost(measured: Sequence[tuple[str, Figures]]) -> Any:
    """Cost of a tree step over a vanilla step, by nodes; the tree that `auto` picks is a ring on the line."""
    lines = [(name, step) for name, model in measured for step in model["steps"]]
    figure = _figure(4.2 + 0.22 * len(lines))
    axes = figure.subplots()
    for index, (name, step) in enumerate(lines):
        nodes = [1, *map(int, step["nodes"])]
        costs = [1.0, *(cost["overhead"] for cost in step["nodes"].values())]
        style = dict(zip(("color", "marker", "linestyle"), _style(index), strict=True))
        axes.plot(nodes, costs, markersize=4, linewidth=1.6, label=_line_label(name, step), **style)
        tree = step["tree"]
        axes.plot(
            tree["nodes"],
            tree["overhead"],
            "o",
            markersize=13,
            fillstyle="none",
            color=style["color"],
        )
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_ylim(bottom=0)
    label(
        axes,
        "Cost of a step (ring: the tree that auto picks)",
        "nodes of the tree",
        "vanilla steps",
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=9
    )
    return figure


def _style(index: int) -> tuple[str, str, str]:
    """Colour, marker and dash of a line: told apart without colour too."""
    return HEAD_COLOURS[index % len(HEAD_COLOURS)], "osD^v"[index % 5], ("-", "--", ":")[index % 3]


def _line_label(name: str, step: Figures) -> str:
    tree = step["tree"]
    how = "SIMULATED acceptance" if tree["simulated"] else "forecast"
    return (
        f"{name}, {step['context']} positions; auto: {tree['nodes']} nodes, {tree['speedup']:.2f}x ({how}),"
        f" vanilla at {step['bandwidth']['vanilla']['share_of_limit']:.0%} of bandwidth"
    )


def _step_parts(measured: Sequence[tuple[str, Figures]]) -> Any:
    """Shares of the step as one bar for each model and mode."""
    rows = [
        (name, mode, parts) for name, model in measured for mode, parts in model["parts"].items()
    ]
    figure = _figure(1.5 + 0.42 * len(rows))
    axes = figure.subplots()
    reached = [0.0] * len(rows)
    for (part, name), colour in zip(
        PARTS.items(), (*HEAD_COLOURS[: len(PARTS) - 1], SOFT), strict=True
    ):
        shares = [100 * parts["shares"][part] for _, _, parts in rows]
        drawn = axes.barh(
            range(len(rows)), shares, 0.7, left=reached, color=colour, edgecolor="white", label=name
        )
        texts = [f"{share:.0f}" if share >= 3 else "" for share in shares]
        ink = INK if colour == SOFT else "white"
        axes.bar_label(drawn, texts, label_type="center", fontsize=8, color=ink, fontweight="bold")
        reached = [a + b for a, b in zip(reached, shares, strict=True)]
    several = len({name for name, _, _ in rows}) > 1
    names = [
        f"{name}, {mode}\n{p['step_ms']:.2f} ms" if several else f"{mode}\n{p['step_ms']:.2f} ms"
        for name, mode, p in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    label(axes, "Where the time of a step goes", "% of the step", "")
    axes.grid(axis="y", visible=False)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(PARTS),
        frameon=False,
        fontsize=9,
    )
    return figure
