"""Look after the checkpoints of a run: on any machine, without its config, its model or its devices.

    python -m tools.checkpoint list runs/mine
    python -m tools.checkpoint verify runs/mine --arrays
    python -m tools.checkpoint inspect runs/mine --step 1000
    python -m tools.checkpoint diff runs/mine/checkpoints/1000 runs/mine/checkpoints/2000
    python -m tools.checkpoint pin runs/mine 1000
    python -m tools.checkpoint prune runs/mine --keep 1 --keep_every 10000 --dry_run
    python -m tools.checkpoint export runs/mine --out mine.safetensors

DIR is a run's folder, its checkpoints/, or one checkpoint there. verify and list read every file and compare
its hash; --arrays reads the arrays as well and compares their fingerprints. Nothing is ever deleted but by
prune, and never the only checkpoint that is good. Exit codes: 1 where verify finds damage, 2 for a mistake.
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import command, manifests, retention, startup
from lm.config import ConfigError


class Place(NamedTuple):
    """Where checkpoints lie, and the one that was named; None for none."""

    folder: Path
    step: int | None


def main(argv: list[str] | None = None) -> int:
    """Read the flags, do what the command says, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = command.Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")

    def add(name: str, help: str, *folders: str, step: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help, parents=[shared])
        for folder in folders:
            one.add_argument(folder, metavar=folder.upper())
        if step:
            one.add_argument("--step", default="", help="which; else the last that is finished")
        return one

    one = add("verify", "compare every file with its hash; exit code 1 for damage", "dir")
    one.add_argument("--step", default="", help="which; else all")
    one.add_argument("--arrays", action="store_true", help="read the arrays as well, and compare")
    add("list", "a line a checkpoint: size, state, metrics", "dir")
    add("inspect", "a line an array: shape, type, norm, least, largest, NaN", "dir", step=True)
    add("diff", "a line an array that differs, and how many are equal", "dir", "other")
    one = add("prune", "delete what is not to be kept", "dir")
    one.add_argument("--keep", type=int, required=True, help="how many of the newest")
    one.add_argument("--keep_every", type=int, default=0, help="those at its multiples too")
    one.add_argument("--keep_best", default="", metavar="METRIC", help="the lowest of it too")
    one.add_argument("--dry_run", action="store_true", help="say what would go; delete nothing")
    one = add("export", "write the parameters, averaged where that was kept", "dir", step=True)
    one.add_argument("--out", required=True, help="the .safetensors to make")
    one.add_argument("--part", default="", help="params, ema, ... or all; else ema or params")
    for name, help in (("pin", "never delete this one"), ("unpin", "take that back")):
        add(name, help, "dir").add_argument("step", metavar="STEP")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever wrote them
    startup.prepare()
    return globals()[f"_{args.command}"](args, _place(args.dir))


def _place(text: str) -> Place:
    path = Path(text).absolute()
    if (path / "checkpoints").is_dir():
        return Place(path / "checkpoints", None)
    if path.name.isdecimal() and path.is_dir():
        return Place(path.parent, int(path.name))
    if path.is_dir() and manifests.all_steps(path):
        return Place(path, None)
    raise ConfigError(
        f"{text}: no checkpoints there; give a run's folder or one of its checkpoints"
    )


def _chosen(place: Place, step: str = "") -> int:
    """Return the step that was asked for, or else the last that is finished."""
    steps = manifests.all_steps(place.folder)
    if step:
        if step not in map(str, steps):
            raise ConfigError(f"step {step}: {place.folder} has {', '.join(map(str, steps))}")
        return int(step)
    if place.step is not None:
        return place.step
    if not (good := manifests.good_steps(place.folder)):
        raise ConfigError(f"{place.folder}: no finished checkpoint")
    return good[-1]


def _whole(place: Place, step: str = "") -> int:
    """Return the step that was asked for. Raises ConfigError where it is damaged."""
    chosen = _chosen(place, step)
    if problem := manifests.problem(place.folder, chosen):
        raise ConfigError(f"checkpoint {place.folder / str(chosen)}: {problem}")
    return chosen


def _arrays(folder: Path, step: int, names: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    from lm import stored

    return ((name, np.asarray(x)) for name, x in stored.read_all(folder, step, names=names))


def _verify(args: argparse.Namespace, place: Place) -> int:
    one = args.step or place.step is not None
    damaged, steps = 0, [_chosen(place, args.step)] if one else manifests.all_steps(place.folder)
    if not steps:
        raise ConfigError(f"{place.folder}: no checkpoint there")
    for step in steps:
        problem = manifests.problem(place.folder, step)
        if problem and not one and (why := _in_use(place.folder, step)):
            print(f"checkpoint {step}: {why}", flush=True)
            continue
        checked = "files"
        if args.arrays and not problem:
            from lm import stored

            problem, checked = stored.problem(place.folder, step), "files and arrays"
        print(f"checkpoint {step}: {problem or f'{checked} are what was saved'}", flush=True)
        damaged += bool(problem)
    return 1 if damaged else 0


def _in_use(folder: Path, step: int) -> str:
    """Return what a run that trains there does with a checkpoint that is not good; "" for nothing."""
    if not (folder / str(step)).is_dir():
        return "deleted meanwhile"
    if manifests.read(folder, step) is not None:
        return ""
    try:
        with (folder.parent / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "being written"
    except OSError:  # no lock, or no locks there
        pass
    return ""


def _list(args: argparse.Namespace, place: Place) -> int:
    folder = place.folder
    best = manifests.best_step(folder, _best_metric(folder))
    pinned = retention.pinned(folder)
    for step in manifests.all_steps(folder):
        size = 0
        for path in (folder / str(step)).rglob("*"):
            with contextlib.suppress(OSError):  # a run that trains renames and deletes; rights
                size += path.stat().st_size if path.is_file() else 0
        problem = manifests.problem(folder, step)
        marks = [mark for mark, on in (("best", step == best), ("pinned", step in pinned)) if on]
        metrics = (manifests.read(folder, step) or {"metrics": {}})["metrics"]
        words = [f"{n} {v:,.0f}" if v == int(v) else f"{n} {v:.4g}" for n, v in metrics.items()]
        state = _in_use(folder, step) or f"damaged: {problem}" if problem else "good"
        print(
            f"{step:>9}  {size / 1e6:>10.3f} MB  {'; '.join([state, *marks])}  {'  '.join(words)}"
        )
    if aside := sorted(path.name for path in folder.glob("*.aside*")):
        print(f"moved aside, not used: {', '.join(aside)}")
    return 0


def _best_metric(folder: Path) -> str:
    """Return what a run's best checkpoint has the lowest of, as its config.json says, if there is one."""
    try:
        config = json.loads(manifests.content(folder.parent / "config.json"))
        return str(config["checkpoint"]["best_metric"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "eval/loss"


def _inspect(args: argparse.Namespace, place: Place) -> int:
    step = _whole(place, args.step)
    names = list((manifests.read(place.folder, step) or {})["arrays"])
    names.sort(key=lambda name: not name.startswith("params."))  # what most look for first
    wide = max(map(len, names), default=0)
    print(
        f"{'array':<{wide}} {'shape':<20} {'type':<9} {'norm':>10} {'least':>10} {'largest':>10} {'NaN':>5}"
    )
    for name, array in _arrays(place.folder, step, names):
        values = array.astype(np.float64)
        numbers = values[~np.isnan(values)]
        ends = (numbers.min(), numbers.max()) if numbers.size else (np.nan, np.nan)
        print(
            f"{name:<{wide}} {'x'.join(map(str, array.shape)) or 'one':<20} {array.dtype!s:<9} "
            f"{np.linalg.norm(numbers):>10.4g} {ends[0]:>10.4g} {ends[1]:>10.4g} "
            f"{values.size - numbers.size:>5}"
        )
    return 0


def _diff(args: argparse.Namespace, place: Place) -> int:
    other = _place(args.other)
    step, other_step = _whole(place), _whole(other)
    print(f"{place.folder / str(step)} and {other.folder / str(other_step)}")
    ours = (manifests.read(place.folder, step) or {})["arrays"]
    theirs = (manifests.read(other.folder, other_step) or {})["arrays"]
    for which, one, two in (("first", ours, theirs), ("second", theirs, ours)):
        for name in sorted(set(one) - set(two)):
            print(f"{name}: only in the {which}")
    common = [name for name in ours if name in theirs]
    differ = [name for name in common if ours[name][:2] != theirs[name][:2]]
    for name in differ:
        print(f"{name}: {ours[name][:2]} and {theirs[name][:2]}")
    same = [name for name in common if name not in differ]
    pairs = zip(
        _arrays(place.folder, step, same), _arrays(other.folder, other_step, same), strict=True
    )
    equal = 0
    for (name, one_array), (_, two_array) in pairs:
        if one_array.tobytes() == two_array.tobytes():
            equal += 1
            continue
        apart = np.abs(one_array.astype(np.float64) - two_array.astype(np.float64))
        count = int((one_array != two_array).sum())
        print(f"{name}: largest difference {np.max(apart):.4g}, {count:,} of {apart.size:,} differ")
    print(f"{equal:,} of {len(common):,} arrays in both are the same, bit for bit")
    return 0


def _prune(args: argparse.Namespace, place: Place) -> int:
    folder = place.folder
    if args.keep < 1 or args.keep_every < 0:
        raise ConfigError("keep at least --keep 1, and --keep_every 0 or more")
    steps = manifests.good_steps(folder)
    if args.keep_best and manifests.best_step(folder, args.keep_best) is None:
        raise ConfigError(f"--keep_best {args.keep_best}: no checkpoint has that metric")
    kept = retention.kept(folder, args.keep, args.keep_every, args.keep_best)
    # One of those that are kept must be good, or else the newest that is stays too.
    order = sorted(kept, reverse=True) + sorted(set(steps) - kept, reverse=True)
    good = next((step for step in order if not manifests.problem(folder, step)), None)
    if good is None:
        raise ConfigError(f"{folder}: no checkpoint is good; nothing is deleted")
    kept.add(good)
    gone = [step for step in steps if step not in kept]
    failed = [] if args.dry_run else retention.delete(folder, gone)
    would = "would be " if args.dry_run else ""
    print(f"{would}deleted: {', '.join(map(str, gone)) or 'none'}")
    print(f"kept: {', '.join(map(str, sorted(kept)))}")
    if failed:
        raise OSError("; ".join(failed))
    return 0


def _export(args: argparse.Namespace, place: Place) -> int:
    from lm import stored
    from lm.convert import safetensors_file

    step, out = _whole(place, args.step), Path(args.out)
    if out.suffix != ".safetensors" or out.exists():
        raise ConfigError(f"--out {out}: give the name of a new file, with .safetensors at its end")
    names = list((manifests.read(place.folder, step) or {})["arrays"])
    parts = sorted({name.partition(".")[0] for name in names})
    part = args.part or stored.averaged(names)
    if part != "all":
        names = [name for name in names if name.startswith(f"{part}.")]
    if not names:
        raise ConfigError(
            f"--part {part}: checkpoint {step} has no such part; it has {', '.join(parts)}, or all"
        )
    cut = "" if part == "all" else f"{part}."
    arrays = {name.removeprefix(cut): array for name, array in _arrays(place.folder, step, names)}
    order = safetensors_file.standard_order(arrays)
    partial = out.with_name(f"{out.name}.partial")
    partial.unlink(missing_ok=True)
    safetensors_file.write(partial, arrays, order=order, metadata={"step": str(step), "part": part})
    partial.replace(out)
    size = sum(array.nbytes for array in arrays.values())
    print(f"{out}: {len(arrays):,} arrays of {part}, step {step}, {size / 1e6:.3f} MB")
    return 0


def _pin(args: argparse.Namespace, place: Place) -> int:
    step = _whole(place, args.step)
    retention.pin(place.folder, step)
    if manifests.read(place.folder, step) is None:  # a run that trains was faster
        retention.unpin(place.folder, step)
        raise ConfigError(f"step {step}: it is deleted just now; choose a newer one")
    print(f"checkpoint {step} is pinned: it is kept until `unpin`")
    return 0


def _unpin(args: argparse.Namespace, place: Place) -> int:
    step = _chosen(place, args.step)
    if step not in retention.pinned(place.folder):
        raise ConfigError(f"step {step}: it is not pinned")
    retention.unpin(place.folder, step)
    print(f"checkpoint {step} is not pinned any more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
