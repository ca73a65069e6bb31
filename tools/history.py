"""Train every family on the same corpus with the same budget, and put them into one table and one picture.

    python -m tools.history --config experiments/history.py --workdir runs/history

Each model is a run of `lm.main` in a folder of its own. Started again, finished runs are skipped and an
interrupted one resumes. Results: history.md (the table), history.csv, history.png.
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm import command, manifests, startup
from lm import config as config_lib
from tools import sweep as sweep_tool

PROMPT, MASKED = "Return the", "Return the [MASK] of the list."
COLUMNS = (
    "model",
    "year",
    "paper",
    "parameters",
    "training FLOPs",
    "minutes",
    "bits per byte",
    "nats",
    "sample",
)
_INK = "#333333"


def result(workdir: Path, name: str, year: int, paper: str) -> dict[str, Any]:
    """Return the row of a finished run."""
    from lm import checkpoint, experiment, metrics, models, step
    from lm import workdir as workdirs
    from lm.complete import Sampling

    folder = workdir / name
    rows = metrics.read_rows(folder / "metrics.jsonl", numbers=True)
    last = {key: value for row in rows for key, value in row.items()}
    loaded = checkpoint.load(folder)
    completer = workdirs.completer(folder, loaded)
    cfg = experiment.freeze(config_lib.complete(loaded.config, experiment.SCHEMA))
    tokens = last["step"] * cfg["data"].batch_size * completer.task.row_length
    scored = completer.task.max_scored / completer.task.row_length
    flops = models.flops_per_token(loaded.model.cfg, completer.task.row_length, scored)
    sampling = Sampling(max_tokens=24, temperature=0.0, top_k=1)
    prompt = MASKED if completer.kind == "masked" else PROMPT
    (text,) = completer.complete([prompt], sampling)
    shown = f"{prompt}{text}" if completer.goes_on else f"{prompt} -> {text}"
    return {
        "model": name,
        "year": year,
        "paper": paper,
        "parameters": step.count_parameters(loaded.params),
        "training FLOPs": flops * tokens,
        "minutes": minutes(rows),
        "bits per byte": last.get("eval/bits_per_byte", math.nan),
        "nats": last["eval/loss"],
        "sample": " ".join(shown.split()),
    }


def minutes(rows: Sequence[dict[str, Any]]) -> float:
    """Return how long a run trained by its metrics, compiling, evaluating and pauses not counted."""
    seconds, before = 0.0, 0
    for row in rows:
        if "train/tokens" in row:
            if row.get("steps_per_second", 0.0) > 0:
                seconds += (row["step"] - before) / row["steps_per_second"]
            before = row["step"]
    return seconds / 60


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        bits = row["bits per byte"]
        cells = [
            row["model"], str(row["year"]), row["paper"], f"{row['parameters']:,}",
            f"{row['training FLOPs']:.1e}", f"{row['minutes']:.2g}",
            "" if math.isnan(bits) else f"{bits:.3f}", f"{row['nats']:.3f}",
            "`" + row["sample"].replace("|", "\\|").replace("`", "'") + "`",
        ]  # fmt: skip
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte over the years to `path`."""
    from matplotlib.figure import Figure

    scored = [row for row in rows if not math.isnan(row["bits per byte"])]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    order = sorted(scored, key=lambda row: row["bits per byte"], reverse=True)
    values = [row["bits per byte"] for row in order]
    axes.barh(range(len(order)), values, color="#4477aa", height=0.7)
    axes.set_yticks(range(len(order)), [f"{row['model']}, {row['year']}" for row in order])
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.3f}", va="center", color=_INK)
    axes.set_xlabel("bits per byte of the validation split, lower is better")
    axes.set_xlim(0, 1.12 * max(values, default=1.0))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    manifests.write_whole(path, picture.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = command.Parser(
        prog="python -m tools.history",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.SECTION.FIELD=VALUE sets a field for every model.",
    )
    parser.add_argument("--config", default="experiments/history.py", help="(%(default)s)")
    parser.add_argument("--workdir", default="runs/history", help="(%(default)s)")
    parser.add_argument("--only", nargs="*", metavar="MODEL", help="train some of the models")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    fixed, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)

    def work() -> int:
        command.check_folder("--workdir", args.workdir)
        return _run(args, fixed)

    return command.exit_on_user_error(work, debug=args.debug)


def _run(args: argparse.Namespace, fixed: list[str]) -> int:
    startup.prepare()
    points = sweep_tool.read_points(args.config)
    papers = config_lib.call(args.config, "papers")
    if unknown := sorted(set(args.only or ()) - set(points)):
        raise config_lib.ConfigError(f"--only {unknown[0]}: no such model; use {', '.join(points)}")
    code = sweep_tool.run(args.config, args.workdir, fixed=fixed, only=args.only or ())
    workdir = Path(args.workdir)
    done = {row["name"] for row in sweep_tool.read_rows(workdir) if row["exit_code"] == 0}
    rows = [result(workdir, name, *papers[name]) for name in points if name in done]
    rows.sort(key=lambda row: row["year"])
    if rows:
        manifests.write_whole(workdir / "history.md", table(rows))
        manifests.write_whole(workdir / "history.csv", sweep_tool.csv_of(rows, COLUMNS))
        draw(rows, workdir / "history.png")
        print(table(rows))
        print(f"{workdir}/history.md, history.csv, history.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
