"""Run the points of an experiment file's `sweep()` one after the other, and tabulate how they end.

    python -m tools.sweep --config experiments/mine.py --workdir runs/mine/sweep

Each point is a run of `lm.main` in a folder of its own. Started again, the sweep skips finished
points and resumes the interrupted one, and refuses where the config is another now; a point that fails
does not stop the others. Results are in sweep.json and sweep.csv; the exit code is the worst of the points'.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import command, exits, manifests, metrics
from lm import config as config_lib
from lm import sweep as sweep_lib
from lm.config import ConfigError
from lm.sweep import Point

MAIN = (sys.executable, "-m", "lm.main")
_MARKER = "sweep_point.json"  # in a point's folder once it has finished


def run(
    path: str | Path,
    workdir: str | Path,
    *,
    fixed: Sequence[str] = (),
    metric: str = "eval/loss",
    only: Sequence[str] = (),
    command: Sequence[str] = MAIN,
) -> int:
    """Run every unfinished point of the file's sweep in `workdir`, and return the worst exit code.

    `fixed` are assignments for all points, which win over a point's own; `metric` sorts the table,
    smallest first; `only` names the points to run: of the others the table has those that have finished.

    Raises ConfigError where `fixed` makes two points the same, or a point's folder is of another config.
    """
    every = read_points(path)
    points = {name: point for name, point in every.items() if not only or name in only}
    _check_apart(points, fixed)
    base = config_lib.to_json(_readable(config_lib.load(path)))
    assigned = {name: [*sweep_lib.assignments(point), *fixed] for name, point in every.items()}
    marks = {
        name: {"identity": hashlib.sha256("\n".join([base, *given]).encode()).hexdigest()}
        for name, given in assigned.items()
    }
    for name in points:
        _check_folder(Path(workdir) / name, marks[name])
    codes: dict[str, int] = {}
    for number, (name, point) in enumerate(points.items(), start=1):
        folder, mark = Path(workdir) / name, marks[name]
        keys = {assignment.partition("=")[0] for assignment in fixed}
        swept = [key for key in point if key not in {"name", *keys}]
        done = finished(folder)
        print(f"[{number}/{len(points)}] {name}{': finished' if done else ''}", flush=True)
        if not done:
            _write(folder / _MARKER, json.dumps({**mark, "finished": False}))
        codes[name] = 0 if done else _run_point(command, path, folder, assigned[name], swept=swept)
        if codes[name] == 0:
            _write(folder / _MARKER, json.dumps(mark))
        others = (n for n in every if n not in codes and _is_done(Path(workdir) / n, marks[n]))
        ended = {**codes, **dict.fromkeys(others, 0)}
        rows = [_result(Path(workdir), n, every[n], code) for n, code in ended.items()]
        rows.sort(key=lambda row: math.inf if (value := _number(row, metric)) is None else value)
        _save(Path(workdir), rows)
        if codes[name] in (exits.STOPPED, exits.HUNG_UP, exits.RESUMABLE, exits.TERMINATED):
            print(f"interrupted; the same command goes on with {name}")
            break
    print(f"\n{table(rows, metric)}\n{workdir}/sweep.csv")
    return exits.worst(list(codes.values()))


def _readable(config: Any) -> Any:
    """Return a config whose values JSON has: of numbers of numpy and paths, what a run reads them as."""
    return config_lib.ConfigDict(json.loads(json.dumps(config.to_dict(), default=_plain)))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def finished(folder: Path) -> bool:
    """Return whether the point of a sweep in `folder` has finished."""
    mark = _read_json(folder / _MARKER)
    return "identity" in mark and mark.get("finished", True)


def _is_done(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Return whether the point of this config has finished in `folder`."""
    return finished(folder) and _read_json(folder / _MARKER)["identity"] == mark["identity"]


def _check_folder(folder: Path, mark: Mapping[str, Any]) -> None:
    """Refuse a folder in which a point of another config has run: its numbers are not this one's."""
    then = _read_json(folder / _MARKER).get("identity", mark["identity"])
    if then != mark["identity"] and (finished(folder) or (folder / "config.json").exists()):
        raise ConfigError(
            f"{folder} holds this point of another config; choose another --workdir, set the config back, or "
            "delete that folder"
        )


def read_points(path: str | Path) -> dict[str, Point]:
    """Return the points of the file's `sweep()` by name.

    Raises ConfigError where there are none, or two are the same.
    """
    points = config_lib.call(path, "sweep")
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        raise ConfigError(
            f"config={path}: sweep() must return a list of dicts, as lm.sweep.grid does"
        )
    if not points:
        raise ConfigError(f"config={path}: sweep() returned no point; give it at least one")
    named: dict[str, Point] = {}
    for point in points:
        name = sweep_lib.name(point)
        if "/" in name or name in (".", ".."):
            raise ConfigError(f"config={path}: sweep(): name={name!r} is no name of a folder")
        if point == named.get(name):
            raise ConfigError(f"config={path}: sweep() has {point} twice; keep one")
        if name in named:
            raise ConfigError(
                f'config={path}: sweep(): {point} and {named[name]} are both called {name}; give one a "name"'
            )
        named[name] = point
    return named


def _check_apart(points: Mapping[str, Point], fixed: Sequence[str]) -> None:
    """Refuse assignments for all points that leave two of them the same."""
    keys = {assignment.partition("=")[0] for assignment in fixed}
    seen: dict[str, str] = {}
    for name, point in points.items():
        rest = str({k: v for k, v in point.items() if k not in keys and k != "name"})
        if rest in seen and (shared := keys & {*point, *points[seen[rest]]}):
            raise ConfigError(
                f"{', '.join(sorted(shared))}: with this flag the points {seen[rest]} and "
                f"{name} are the same; leave it out"
            )
        seen[rest] = name


def _run_point(
    command: Sequence[str],
    path: str | Path,
    folder: Path,
    given: Sequence[str],
    *,
    swept: Iterable[str],
) -> int:
    flags = [f"--config.{assignment}" for assignment in given]
    flags += [f"--swept={','.join(swept)}"]
    # A place of its own: in one for all the second point would go on with the first.
    if place := _remote(path, given):
        flags.append(f"--config.checkpoint.remote={place.rstrip('/')}/{folder.name}")
    child = subprocess.Popen([*command, "--config", str(path), "--workdir", str(folder), *flags])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    interrupted = False
    try:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:  # the point has it too, and saves before it ends
                interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if interrupted and code == 0:  # it was not told, and has finished; the next one does not begin
        return exits.STOPPED
    return code if code >= 0 else 128 - code


def _remote(path: str | Path, given: Iterable[str]) -> str:
    """Return the checkpoint.remote of a point, "" for none."""
    key = "checkpoint.remote"
    asked = [text.partition("=")[2] for text in given if text.partition("=")[0] == key]
    return asked[-1] if asked else config_lib.flatten(config_lib.load(path)).get(key, "")


def _result(workdir: Path, name: str, point: Point, code: int) -> dict[str, Any]:
    """Return a row: the point, how it ended, and each metric's last value, None if not finite."""
    row: dict[str, Any] = {"name": name, "exit_code": code, **point}
    record = workdir / name / "metrics.jsonl"
    try:
        found = metrics.read_rows(record, numbers=True) if record.exists() else []
    except ConfigError as error:  # the other points go on
        print(f"warning: {name}: {error}", file=sys.stderr, flush=True)
        found = []
    for values in found:
        row |= {key: value if math.isfinite(value) else None for key, value in values.items()}
    return row


def _save(workdir: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write(workdir / "sweep.json", json.dumps(list(rows), indent=2, default=str) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    _write(workdir / "sweep.csv", csv_of(rows, columns))


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return the rows as the text of a CSV file."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of the sweep in `workdir`: its points that have ended."""
    return json.loads((workdir / "sweep.json").read_text())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    manifests.write_whole(path, text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not finished, or killed as it was
        return {}


def table(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Return aligned columns: name, how it ended, step, `metric`, the training loss."""
    cells = [["point", "ended", "step", metric, "train/loss"]]
    for row in rows:
        ended = exits.words(row["exit_code"])
        losses = [_number(row, key) for key in (metric, "train/loss")]
        numbers = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        cells.append([row["name"], ended, str(row.get("step", "-")), *numbers])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, int | float) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = command.Parser(
        prog="python -m tools.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.SECTION.FIELD=VALUE sets a field for every point, whatever the point says.",
    )
    parser.add_argument(
        "--config", required=True, help="experiment file with get_config(), sweep()"
    )
    parser.add_argument("--workdir", help="default runs/<experiment>/sweep")
    parser.add_argument("--metric", default="eval/loss", help="sorts the table (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the points, run nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    fixed, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(rest)
    workdir = args.workdir or f"runs/{Path(args.config).stem}/sweep"

    def work() -> int:
        command.check_folder("--workdir", workdir)
        if args.dry_run:
            from lm import experiment

            points = read_points(args.config)
            _check_apart(points, fixed)
            for point in points.values():
                given = [*sweep_lib.assignments(point), *fixed]
                config_lib.override(config_lib.load(args.config), given, experiment.SCHEMA)
            print("\n".join(points))
            return 0
        return run(args.config, workdir, fixed=fixed, metric=args.metric)

    return command.exit_on_user_error(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
