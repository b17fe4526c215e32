"""Figures of `medusa-chat bench --plot`, drawn with matplotlib from the printed result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.terminal.reports.charts import INK, MIDDLE, SOFT, label, supported_kinds
from medusa_chat.terminal.theme import HEAD_COLOURS

if TYPE_CHECKING:
    from pathlib import Path

Figures = Mapping[str, Any]

WIDTH = 9.0  # inches; at 150 dots an inch it is readable at half its size, as in a README
TICKS = (1, 2, 4, 8, 16, 32, 64)
PARTS = {
    "forward": "backbone's forward",
    "heads": "heads, candidates",
    "acceptance": "acceptance",
    "commit": "commit",
    "rest": "the rest",
}


def check_folder(folder: Path | None) -> None:
    """Raise UserError if figures cannot be written there; call it before the long work."""
    if folder is None:
        return
    supported_kinds()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--plot {folder}: that is a file; --plot takes a folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--plot {folder}: there is no folder {folder.parent}")


def plot_bench(result: Figures, folder: Path) -> list[Path]:
    """Draw replies.png, step_cost.png and step_parts.png, as far as the result has them.

    Returns the files written. Raises OSError if the folder or a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    files = []
    for name, figure in _figures(result):
        style = {"ha": "right", "va": "bottom", "fontsize": 7, "color": MIDDLE}
        figure.text(0.995, 0.01, _caption(result), **style)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _figures(result: Figures) -> Iterator[tuple[str, Any]]:
    models: dict[str, Figures] = {}
    if result["modes"]:
        yield "replies", _replies(result["modes"])
        models[result["model"]] = result
    models |= result.get("shapes", {})
    steps = [(name, step) for name, model in models.items() for step in model["steps"]]
    if steps:
        yield "step_cost", _step_cost(steps)
    if any(model["parts"] for model in models.values()):
        yield "step_parts", _step_parts(models)


def _caption(result: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}; {versions}; {result['date'][:10]}"


def _figure(height: float) -> Any:
    """Make a figure whose lowest line is free for the caption."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    caption = 0.25 / height
    layout = ConstrainedLayoutEngine(rect=(0, caption, 1, 1 - caption))
    # Without pyplot there is no window and no global state.
    return Figure(figsize=(WIDTH, height), layout=layout)


def _replies(modes: Mapping[str, Figures]) -> Any:
    """Draw acceptance length and speedup as bars, by category and mode."""
    names = [*next(iter(modes.values()))["categories"], "all"]
    figure = _figure(1.6 + 0.22 * len(names) * (len(modes) + 1))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_bars(left, "acceptance_length", "%.2f", modes, names)
    _draw_bars(right, "speedup", "%.2fx", modes, names)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    label(left, "Acceptance length", "tokens a step", "")
    label(right, "Speedup over our own vanilla decoding", "times", "")
    for axes in (left, right):
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_axisbelow(True)
    _legend(figure, left, "outside upper center", ncols=len(modes))
    return figure


def _draw_bars(
    axes: Any, key: str, form: str, modes: Mapping[str, Figures], names: Sequence[str]
) -> None:
    height = 0.8 / len(modes)
    for index, (mode, figures) in enumerate(modes.items()):
        rows = figures["categories"] | {"all": figures}
        lengths = [rows.get(name, {}).get(key) or 0.0 for name in names]
        shift = (index - (len(modes) - 1) / 2) * height
        places = [row + shift for row in range(len(names))]
        colour = HEAD_COLOURS[index % len(HEAD_COLOURS)]
        bars = axes.barh(places, lengths, height * 0.92, color=colour, label=mode)
        axes.bar_label(bars, fmt=form, padding=3, fontsize=8, color=INK)


def _step_cost(steps: Sequence[tuple[str, Figures]]) -> Any:
    """Draw the cost of a tree step over a vanilla step by nodes, with a ring at auto's tree."""
    figure = _figure(4.2 + 0.22 * len(steps))
    axes = figure.subplots()
    for index, (name, step) in enumerate(steps):
        _draw_costs(axes, index, name, step)
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, list(map(str, TICKS)))
    axes.set_ylim(bottom=0)
    title = "Cost of a step (ring: the tree that auto picks)"
    label(axes, title, "nodes of the tree", "vanilla steps")
    _legend(figure, axes, "outside upper left", fontsize=9)
    return figure


def _draw_costs(axes: Any, index: int, name: str, step: Figures) -> None:
    """Draw one line; its colour, marker and dashes differ from the others'."""
    nodes = [1, *map(int, step["nodes"])]
    costs = [1.0, *(cost["overhead"] for cost in step["nodes"].values())]
    colour = HEAD_COLOURS[index % len(HEAD_COLOURS)]
    axes.plot(
        nodes,
        costs,
        color=colour,
        marker="osD^v"[index % 5],
        linestyle=("-", "--", ":")[index % 3],
        markersize=4,
        linewidth=1.6,
        label=_line_label(name, step),
    )
    tree = step["tree"]
    ring = {"markersize": 13, "fillstyle": "none", "color": colour}
    axes.plot(tree["nodes"], tree["overhead"], "o", **ring)


def _line_label(name: str, step: Figures) -> str:
    tree = step["tree"]
    how = "SIMULATED acceptance" if tree["simulated"] else "forecast"
    share = step["bandwidth"]["vanilla"]["share_of_limit"]
    return (
        f"{name}, {step['context']} positions;"
        f" auto: {tree['nodes']} nodes, {tree['speedup']:.2f}x ({how}),"
        f" vanilla at {share:.0%} of bandwidth"
    )


def _step_parts(models: Mapping[str, Figures]) -> Any:
    """Draw the parts of a step as one bar for each model and mode."""
    names = []
    rows = []
    for name, model in models.items():
        for mode, parts in model["parts"].items():
            title = f"{name}, {mode}" if len(models) > 1 else mode
            names.append(f"{title}\n{parts['step_ms']:.2f} ms")
            rows.append(parts["shares"])
    figure = _figure(1.5 + 0.42 * len(rows))
    axes = figure.subplots()
    _draw_parts(axes, rows)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    label(axes, "Where the time of a step goes", "% of the step", "")
    axes.grid(axis="y", visible=False)
    _legend(figure, axes, "outside upper center", ncols=len(PARTS), fontsize=9)
    return figure


def _draw_parts(axes: Any, rows: Iterable[Mapping[str, float]]) -> None:
    colours = (*HEAD_COLOURS[: len(PARTS) - 1], SOFT)
    table = [{part: 100 * shares[part] for part in PARTS} for shares in rows]
    reached = [0.0] * len(table)
    for (part, name), colour in zip(PARTS.items(), colours, strict=True):
        shares = [row[part] for row in table]
        bars = axes.barh(
            range(len(table)),
            shares,
            0.7,
            left=reached,
            color=colour,
            edgecolor="white",
            label=name,
        )
        texts = [f"{share:.0f}" if share >= 3 else "" for share in shares]
        style = {"fontsize": 8, "fontweight": "bold", "color": INK if colour == SOFT else "white"}
        axes.bar_label(bars, texts, label_type="center", **style)
        reached = [start + share for start, share in zip(reached, shares, strict=True)]


def _legend(figure: Any, axes: Any, place: str, **style: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc=place, frameon=False, **style)
