"""Measure how fast an experiment trains, or decodes, alone or in turns with a peer.

    python -m tools.bench --config experiments/gpt_small.py
    python -m tools.bench --config experiments/gpt2_small.py --peer transformers
    python -m tools.bench --config experiments/gpt2_small.py --decode --peer transformers
    python -m tools.bench --config experiments/lstm_small.py --config.optim.name=adamw --peer torch
    python -m tools.bench --config experiments/gpt2_small.py --peer transformers --processes 2
    python -m tools.bench --config experiments/gpt_tiny.py --mesh data=8 fsdp=8 tensor=4,data=2

The tokens are random, of a vocabulary as large as the config's. Machines are noisy: what is compared
takes turns, A B A B, in one run, and the ratio of each round counts, not those of separate runs.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm import command
from lm import config as config_lib
from lm.config import ConfigError
from tools import bench_alike
from tools.bench_alike import PEERS
from tools.bench_pipe import Side, SideError
from tools.bench_processes import Sides

TRAIN_STEPS, DECODE_STEPS = 3, 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    assignments, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    parser = command.Parser(
        prog="python -m tools.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="experiment file; --config.SECTION.FIELD=VALUE overrides",
    )
    parser.add_argument(
        "--decode", action="store_true", help="measure generation at batch 1 instead of training"
    )
    parser.add_argument(
        "--peer", choices=sorted(PEERS), help="take turns with a model of the same shape"
    )
    parser.add_argument(
        "--peer_python",
        metavar="PATH",
        help="interpreter that has the peer's libraries; default this one",
    )
    parser.add_argument(
        "--peer_modes",
        nargs="+",
        metavar="MODE",
        help="such as eager or torch.compile; default all, of which the fastest counts",
    )
    parser.add_argument(
        "--mesh",
        nargs="+",
        metavar="AXIS=N,...",
        help="take turns with one device: meshes such as data=8 fsdp=4,tensor=2",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="of each side, with a device or its share of the cores each; the peer's by DDP",
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side (%(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help=f"updates a turn ({TRAIN_STEPS}), or new tokens a turn ({DECODE_STEPS})",
    )
    parser.add_argument("--json", metavar="OUT", help="write all that was measured to this file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(rest)
    return command.exit_on_user_error(lambda: _run(args, assignments), debug=args.debug)


def _run(args: argparse.Namespace, assignments: list[str]) -> int:
    for name, least in (("rounds", 1), ("steps", 0), ("processes", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name}={getattr(args, name)}: use {least} or more")
    args.steps = args.steps or (DECODE_STEPS if args.decode else TRAIN_STEPS)
    bench_alike.check_flags(args)
    config = checked_config(args, assignments)
    if args.mesh:
        if args.peer or args.decode or args.json:
            raise ConfigError(
                "--mesh: compares meshes in training alone; leave the other flags out"
            )
        from tools import bench_mesh  # here, since it takes its parts from this file

        print(bench_mesh.measure(config, args.mesh, steps=args.steps, rounds=args.rounds))
        return 0
    report = measure(config, args)
    print(describe(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


def checked_config(args: argparse.Namespace, assignments: list[str]) -> Any:
    """Return the config, fit for what is asked.

    Raises:
      ConfigError: a mistake in the config, or one that cannot be compared with the peer.
    """
    from lm.experiment import SCHEMA  # here, so that --help does not wait for jax

    given = config_lib.override(config_lib.load(args.config), assignments, SCHEMA)
    config = config_lib.complete(given, SCHEMA)
    if args.peer:
        bench_alike.check(config, args)
    length = row_tokens(config)
    if args.decode and args.steps + 16 > length:
        raise ConfigError(
            f"--steps={args.steps}: with the prompt, more than the {length} positions of a row; lower it"
        )
    return given


def row_tokens(config: Any) -> int:
    """Return the tokens that a row of the config's task takes."""
    return sum(
        n for field, n in config.task.items() if field in ("length", "context", "source_length")
    )


def measure(config: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return all that was measured of `config`: facts of each side, and times by turn."""
    python = args.peer_python or sys.executable
    if args.peer:
        bench_alike.check_python(args.peer, python)
    # On a GPU shared with a peer, memory is taken as it is needed.
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if args.peer else {}
    load, started = os.getloadavg()[0], time.time()
    with _started("tools.bench_ours", args.processes, **shared) as ours:
        facts = _asked(
            ours, "prepare", config=config_lib.to_json(config), decode=args.decode, started=started
        )
        report: dict[str, Any] = {
            "steps_per_turn": args.steps, "decode": args.decode, "load": load, "ours": facts
        }  # fmt: skip
        turn, limit = ("decode", "bandwidth") if args.decode else ("run", "gemm")
        turns = {"ours": partial(ours.call, turn, steps=args.steps)}
        turns["ours"]()
        facts["peak_bytes"] = ours.call("peak_bytes")  # before the limit takes memory of its own
        with contextlib.ExitStack() as stack:
            if args.peer:
                module = PEERS[args.peer].module
                peer = _started(module, args.processes, python=python, **shared)
                stack.enter_context(peer)
                report["peer"] = {"name": args.peer, **_prepare_peer(peer, facts, args)}
                for mode in report["peer"]["modes"]:
                    turns[mode] = partial(peer.call, "run", mode=mode, steps=args.steps)
            turns[limit] = partial(ours.call, limit)
            report["seconds"] = take_turns(turns, args.rounds)
            report[limit] = report["seconds"].pop(limit)
            if args.peer:
                report["peer"]["peak_bytes"] = peer.call("peak_bytes")
        if not args.peer and not args.decode:
            try:
                report["loop"] = ours.call("loop", steps=args.steps, rounds=args.rounds)
            except SideError as error:  # what was measured before counts
                print(f"notice: the loop does not run here: {error}")
    return report


def _started(
    module: str, processes: int, python: str = sys.executable, **environment: str
) -> Side | Sides:
    if processes == 1:
        return Side(module, python=python, cores=(), **environment)
    return Sides(module, processes=processes, python=python, **environment)


def _asked(side: Side | Sides, method: str, **arguments: Any) -> Any:
    """Return the answer to a call whose failure is a mistake in what was asked for."""
    try:
        return side.call(method, **arguments)
    except SideError as error:
        raise ConfigError(f"{method}: {error}") from error


def _prepare_peer(
    peer: Side | Sides, facts: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Return the peer's facts, and of each of its modes the seconds of a first turn, which compiles.

    A mode that does not run here is told and left out.
    """
    if facts["devices"] != args.processes:
        raise ConfigError(
            f"--peer: runs on one device a process, here are {facts['devices']} in {args.processes}; show as "
            "many"
        )
    shape = {**facts["shape"], **({"rows": 1} if args.decode else {})}
    device = "cpu" if facts["backend"] == "cpu" else "cuda"
    made = _asked(
        peer, "prepare", shape=shape, optim=facts["optim"], decode=args.decode, device=device
    )
    if unknown := sorted(set(args.peer_modes or ()) - set(made["modes"])):
        raise ConfigError(
            f"--peer_modes {unknown[0]}: --peer={args.peer} has no such mode; use some of "
            f"{', '.join(made['modes'])}"
        )
    works = {}
    for mode in args.peer_modes or made["modes"]:
        start = time.perf_counter()
        try:
            peer.call("run", mode=mode, steps=args.steps)
        except SideError as error:
            print(f"notice: the peer's {mode} does not run here: {error}")
            continue
        works[mode] = time.perf_counter() - start
    if not works:
        raise ConfigError("--peer: it runs in none of its modes here; see the errors above")
    return {**made, "modes": works}


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what each turn gave, `rounds` times one after the other; a first round is not counted."""
    results: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            value = turn()
            if number:
                results[name].append(value)
    return results


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, first quartile, third quartile)."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (math.nan,) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def describe(report: dict[str, Any]) -> str:
    """Return the report in words."""
    ours, steps = report["ours"], report["steps_per_turn"]
    sizes = ("family", "num_layers", "model_dim", "vocab_size", "rows", "length")
    shape = " ".join(f"{key}={ours['shape'][key]}" for key in sizes if key in ours["shape"])
    lines = [
        f"device      {ours['devices']} x {ours['device']}, jax {ours['jax']}",
        *(f"flag        {said}" for said in ours["flags"]),
        f"model       {ours['parameters']:,} parameters; {shape}",
        f"first step  {ours['first_step_s']:.1f} s after the start of the process",
        f"peak memory {ours['peak_bytes'] / 2**20:,.0f} MiB",
    ]
    seconds = [value / steps for value in report["seconds"]["ours"]]
    if report["load"] > 0.5:  # threads that wait for each other suffer most, and not all alike
        lines.append(
            f"busy        {report['load']:.1f} processes ran here before: do not trust this"
        )
    lines += (_decoding if report["decode"] else _training)(report, seconds)
    if "peer" in report:
        lines += _comparison(report)
    return "\n".join(lines)


def _training(report: dict[str, Any], seconds: list[float]) -> list[str]:
    ours = report["ours"]
    rates = [ours["tokens_per_step"] / value for value in seconds]
    lines = [
        f"compile     {ours['compile_s']:.1f} s, after tracing for {ours['trace_s']:.1f} s",
        f"step        {_shown([1e3 * value for value in seconds])} ms",
        f"training    {_shown(rates)} tokens/s",
        f"gemm        {_shown([value / 1e9 for value in report['gemm']])} GFLOP/s",
    ]
    for name in ("full", "half"):
        flops = ours[f"flops_{name}"]
        mfu = [100 * rate * flops / peak for rate, peak in zip(rates, report["gemm"], strict=True)]
        lines.append(f"MFU_{name}    {_shown(mfu)} % of the product measured in the same round")
        if ours["data_sheet_flops"]:
            known = [100 * rate * flops / ours["data_sheet_flops"] for rate in rates]
            lines.append(f"            {_shown(known)} % of the data sheet's peak")
    if "loop" in report:
        overhead = [100 * (loop / bare - 1) for loop, bare in report["loop"]]
        lines.append(f"loop        {_shown(overhead)} % over the bare step")
    return lines


def _decoding(report: dict[str, Any], seconds: list[float]) -> list[str]:
    # Weights as they are kept: a cast copy that is smaller would raise the limit.
    num_bytes = 4 * report["ours"]["weights"]
    fractions = [
        100 * num_bytes / value / rate
        for value, rate in zip(seconds, report["bandwidth"], strict=True)
    ]
    return [
        f"decoding    {_shown([1 / value for value in seconds])} tokens/s at batch 1",
        f"memory      {_shown([value / 1e9 for value in report['bandwidth']])} GB/s read",
        f"limit       {_shown(fractions)} % of weights' bytes ({num_bytes / 1e6:,.0f} MB) over that",
    ]


def _comparison(report: dict[str, Any]) -> list[str]:
    """Return the lines on the peer: its modes, and the ratio of each round to its fastest."""
    peer, seconds = report["peer"], report["seconds"]
    lines = [
        f"peer        {peer['name']} on {peer['library']}: {peer['parameters']:,} parameters; "
        f"peak memory {peer['peak_bytes'] / 2**20:,.0f} MiB"
    ]
    fastest = min(peer["modes"], key=lambda mode: statistics.median(seconds[mode]))
    for mode, first in peer["modes"].items():
        shown = _shown([1e3 * value / report["steps_per_turn"] for value in seconds[mode]])
        lines.append(
            f"  {mode:14} {shown} ms a {'token' if report['decode'] else 'step'}; first turn {first:.1f} s"
        )
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[fastest], strict=True)]
    lines.append(f"by round    {' '.join(f'{ratio:.2f}' for ratio in ratios)}")
    lines.append(f"ratio       {_shown(ratios)} times as fast as its fastest, {fastest}")
    return lines


def _shown(values: Sequence[float]) -> str:
    """Return the median and, in brackets, the quartiles."""
    return "{:.4g} [{:.4g}, {:.4g}]".format(*spread(values))


if __name__ == "__main__":
    sys.exit(main())
