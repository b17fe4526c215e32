"""The figure of `medusa-chat calibrate --plot`, and the look of all figures (matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.terminal.theme import HEAD_COLOURS, head_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

INK, MIDDLE, SOFT = "#222222", "#8a8a8a", "#d8d8d8"
MARKERS = {"fixed": "D", "dynamic": "s"}


def check_plot(file: Path) -> None:
    """Raise UserError if the figure cannot be written; call it before the long work."""
    kinds = supported_kinds()
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise UserError(f"--plot writes {', '.join(sorted(kinds))}; {file.name} is none of these")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--plot {file}: there is no folder {file.parent}")


def supported_kinds() -> dict[str, str]:
    """Return the file endings that matplotlib can write. Raises UserError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'medusa-chat[plots]'") from None
    kinds: dict[str, str] = FigureCanvasAgg.get_supported_filetypes()
    return kinds


def plot(
    file: Path,
    top: Sequence[Sequence[float]],
    forecast: Sequence[float],
    checks: Sequence[Mapping[str, Any]],
    title: str,
) -> None:
    """Draw top-i accuracy by head, and acceptance length by nodes.

    Args:
        file: where to write; its ending gives the format. Raises OSError if it cannot be written.
        top: top[k][i]: how often the true token is among head k + 1's likeliest i + 1.
        forecast: forecast[n - 1]: acceptance length of the best tree with n nodes.
        checks: measured trees, each with tree, nodes, measured and error; may be empty.
        title: above both charts.
    """
    from matplotlib.figure import Figure

    # Without pyplot there is no window and no global state.
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_heads(left, top)
    _draw_forecast(right, forecast, checks)
    figure.suptitle(title, fontsize=11, color=INK)
    figure.savefig(file)


def label(axes: Any, title: str, x: str, y: str) -> None:
    """Set the title, the axes' names, the grid and the colours of every figure."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=SOFT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _draw_heads(axes: Any, top: Sequence[Sequence[float]]) -> None:
    """Draw a line for each head in its colour, dashed once the colours repeat."""
    for head, row in enumerate(top, 1):
        rounds, index = divmod(head - 1, len(HEAD_COLOURS))
        axes.plot(
            range(1, len(row) + 1),
            [100 * share for share in row],
            color=HEAD_COLOURS[index],
            linestyle="--" if rounds else "-",
            marker="o",
            markersize=3.5,
            label=f"{head_name(head)}: top-1 {100 * row[0]:.0f}%",
        )
    widest = max(len(row) for row in top)
    axes.set_xticks([1, *range(5, widest + 1, 5)])
    axes.set_ylim(0, 102)
    title = "The true token is among a head's likeliest guesses"
    label(axes, title, "guesses taken", "% of positions")
    _legend(axes)


def _draw_forecast(
    axes: Any, forecast: Sequence[float], checks: Sequence[Mapping[str, Any]]
) -> None:
    nodes = range(1, len(forecast) + 1)
    axes.plot(nodes, forecast, color=MIDDLE, linewidth=2, label="forecast of fixed trees")
    for tree, marker in MARKERS.items():
        measured = [check for check in checks if check["tree"] == tree]
        if measured:
            axes.errorbar(
                [check["nodes"] for check in measured],
                [check["measured"] for check in measured],
                [check["error"] for check in measured],
                color=INK,
                fmt=marker,
                markersize=5,
                capsize=3,
                label=f"{tree} trees, measured on prompts set aside, ± standard error",
            )
    axes.set_xticks(sorted({1, *(check["nodes"] for check in checks)}))
    axes.set_ylim(bottom=0.9)
    label(axes, "Acceptance length of the best tree", "nodes of the tree", "tokens a step")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Put the legend below the axes, where it covers no line."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9)
