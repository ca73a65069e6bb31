"""Draw metrics of one or many runs, from their metrics.jsonl, to a PNG.

    python -m tools.plot --workdir runs/a runs/b --metric train/loss eval/loss --out loss.png

A run has a colour and a metric a line style. Training metrics are smoothed, over the raw rows in a
paler tone; evaluations are marked where they were made.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from lm import command
from lm import metrics as metrics_lib
from lm.config import ConfigError

DEFAULT_METRICS = ("train/loss", "eval/loss")
X_LABELS = {"step": "updates", "tokens": "training tokens", "time": "training time (minutes)"}
_STYLES = ("-", "--", ":", "-.")
_INK = "#333333"


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of one workdir."""

    name: str  # what the legend says
    folder: Path
    rows: list[dict[str, float]]

    def curve(self, metric: str, *, x: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the abscissae and values, float64, of the rows that hold `metric`."""
        rows = [row for row in self.rows if metric in row]
        steps = np.array([row["step"] for row in rows], float)
        return self._abscissae(steps, x), np.array([row[metric] for row in rows], float)

    def _abscissae(self, steps: np.ndarray, x: str) -> np.ndarray:
        if x == "step":
            return steps
        # Time spent on updates alone: runs that evaluate more often are not the slower for it.
        metric = {"tokens": "train/tokens", "time": "steps_per_second"}[x]
        told = [row for row in self.rows if row.get(metric, 0) > 0]
        if not told:
            raise ConfigError(f"{self.folder}: no row has {metric}; use --x step")
        ends = np.array([0.0] + [row["step"] for row in told])
        of_step = np.array([row[metric] for row in told])  # as of all since the row before
        of_step = of_step if x == "tokens" else 1 / (60 * of_step)
        return np.interp(steps, ends, np.concatenate([[0.0], np.cumsum(np.diff(ends) * of_step)]))


def read_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """Return the runs of `workdirs`, named by the parts of their paths that they do not share.

    Raises ConfigError for a folder without metrics.
    """
    folders = list(dict.fromkeys(Path(workdir).absolute() for workdir in workdirs))
    # One run alone is <experiment>/<timestamp>.
    shared = os.path.commonpath(folders) if len(folders) > 1 else folders[0].parent.parent
    runs = []
    for folder in folders:
        record = folder / "metrics.jsonl"
        if not record.is_file():
            raise ConfigError(f"workdir={folder}: no metrics.jsonl there; give a run's folder")
        rows = metrics_lib.read_rows(record, numbers=True)
        runs.append(Run(str(folder.relative_to(shared)), folder, rows))
    return runs


def choose_metrics(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """Return the metrics to draw: those asked for, which every run must have, or the default ones.

    Raises ConfigError, naming the nearest metric, where a run does not have one.
    """
    held = {run.name: {key for row in run.rows for key in row} - {"step"} for run in runs}
    for metric in asked:
        for name, keys in held.items():
            if metric not in keys:
                near = difflib.get_close_matches(metric, sorted(keys), n=1, cutoff=0.0)
                hint = f"did you mean {near[0]}?" if near else "it has none yet"
                raise ConfigError(f"metric={metric}: run {name} does not have it; {hint}")
    if asked:
        return list(asked)
    found = [metric for metric in DEFAULT_METRICS if any(metric in keys for keys in held.values())]
    if not found:
        raise ConfigError(f"metric: no run has {' or '.join(DEFAULT_METRICS)}; name one it has")
    return found


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Return averages over neighbours, each row's weight falling by `weight` a row to both sides.

    A one-sided average would lag: a falling training loss would look worse than the evaluations.
    NaN stays where it is and counts nothing.
    """
    finite = np.isfinite(values)
    rows = np.stack([np.where(finite, values, 0.0), finite])  # sums and their weights
    before, after = rows.copy(), rows.copy()
    for i in range(1, len(values)):
        before[:, i] += weight * before[:, i - 1]
        after[:, -1 - i] += weight * after[:, -i]
    sums, weights = before + after - rows
    return np.where(finite, sums / np.where(finite, weights, 1.0), np.nan)


def draw(
    workdirs: Sequence[str | Path],
    *,
    metrics: Sequence[str] = (),
    x: str = "step",
    smooth: float = 0.8,
    log: bool = False,
) -> Figure:
    """Return a figure of the runs' metrics; metrics of one kind (their last name) share a panel.

    Raises ConfigError for a folder or a metric that is not there.
    """
    runs = read_runs(workdirs)
    names = choose_metrics(runs, metrics)
    kinds = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
    figure = Figure(figsize=(8, 1 + 4 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), sharex=True, squeeze=False)[:, 0]
    for panel, kind in zip(panels, kinds, strict=True):
        members = [name for name in names if name.rpartition("/")[2] == kind]
        for color, run in zip(_colors(len(runs)), runs, strict=True):
            for k, metric in enumerate(members):
                across, values = run.curve(metric, x=x)
                label = metric if len(runs) == 1 else f"{run.name}  {metric}"
                weight = smooth if metric.startswith("train/") else 0.0
                (line,) = _draw_curve(panel, across, values, label, weight, color=color)
                line.set(linestyle=_STYLES[k % len(_STYLES)])
                line.set(marker="o" if metric.startswith("eval") else "", markersize=4)
        _dress(panel, kind, log=log)
    panels[-1].set_xlabel(X_LABELS[x], color=_INK)
    if len(runs) == 1:
        figure.suptitle(runs[0].name, color=_INK)
    return figure


def _colors(count: int) -> list[Any]:
    """Return a colour for each of so many runs: of more than matplotlib has apart, along a map."""
    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _draw_curve(
    panel: Axes, across: np.ndarray, values: np.ndarray, label: str, smooth: float, *, color: str
) -> list[Line2D]:
    if smooth:
        panel.plot(across, values, color=color, alpha=0.2, linewidth=0.8)
        values = smoothed(values, smooth)
    finite = values[np.isfinite(values)]
    last = f"{finite[-1]:.4g}" if len(finite) else "no finite value"
    return panel.plot(across, values, color=color, linewidth=1.8, label=f"{label}  {last}")


def _dress(panel: Axes, kind: str, *, log: bool) -> None:
    panel.set_ylabel({"loss": "loss (nats per token)"}.get(kind, kind), color=_INK)
    if log:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    panel.grid(True, which="both" if log else "major", color="#e5e5e5", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(colors=_INK, which="both")
    panel.margins(x=0.01)
    panel.legend(frameon=False, fontsize=9)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = command.Parser(
        prog="python -m tools.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", nargs="+", required=True, help="folders of runs")
    parser.add_argument("--metric", nargs="+", default=(), help="default: train/loss eval/loss")
    parser.add_argument("--x", choices=list(X_LABELS), default="step", help="(%(default)s)")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.8,
        help="weight of a row's neighbours, 0 = none (%(default)s)",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic values")
    parser.add_argument("--out", help="default: loss.png, in the workdir if there is but one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    home = Path(args.workdir[0]) if len(args.workdir) == 1 else Path()
    out = Path(args.out) if args.out else home / "loss.png"

    def work() -> None:
        if not 0 <= args.smooth < 1:
            raise ConfigError(f"smooth={args.smooth}: use a number from 0 to below 1")
        figure = draw(args.workdir, metrics=args.metric, x=args.x, smooth=args.smooth, log=args.log)
        kinds = figure.canvas.get_supported_filetypes()
        if out.suffix[1:].lower() not in kinds:
            raise ConfigError(f"out={out}: use a name that ends in one of {', '.join(kinds)}")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        print(out)

    return command.exit_on_user_error(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
