"""Measure how fast packed, shuffled batches are read, in turns with the ways that others read them.

    python -m tools.bench_data
    python -m tools.bench_data --peers grain datasets --peer_python other/bin/python

All sides read the same random documents of log-normal lengths, made on the spot. Ours are packed by best fit
beforehand and can begin at any step. `grain` reads documents from ArrayRecord, packed as they come, and
`datasets`, with PyTorch's loader, from Arrow; `datasets_rows` has rows joined and cut beforehand, with what
tells their documents apart. Also: how long a loop of 200,000 positions a second waits for ours, and the same
random rows from ArrayRecord and from memory-mapped shards.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from lm import command
from lm.config import ConfigError
from lm.data import packing, shards, tokenizers
from lm.data.corpus import load
from lm.data.shards import ORIGIN, SPLITS
from lm.data.writer import Encoded, Writer
from tools.bench import spread, take_turns
from tools.bench_pipe import Side

NEEDS = {
    "grain": ("grain", "array_record"),
    "datasets": ("datasets", "torch"),
    "datasets_rows": ("datasets", "torch"),
}


def main(argv: list[str] | None = None) -> int:
    """Read the flags, measure, print, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--peers", nargs="*", choices=sorted(NEEDS), default=["grain"], help="compare with"
    )
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter with datasets and torch"
    )
    parser.add_argument("--tokens", type=float, default=2e7, help="tokens of all documents")
    parser.add_argument("--length", type=int, default=2048, help="positions of a row")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=100, help="batches of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    for name in ("tokens", "length", "rows", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)}: use 1 or more")
    if args.tokens < (least := args.length * args.rows):
        raise ConfigError(f"--tokens={args.tokens:g}: fewer than a batch of {least:,}; use more")
    pythons = {peer: sys.executable if peer == "grain" else args.peer_python for peer in NEEDS}
    for peer in args.peers:
        imports = [pythons[peer], "-c", f"import {', '.join(NEEDS[peer])}"]
        if subprocess.run(imports, capture_output=True).returncode:
            raise ConfigError(
                f"--peers {peer}: {pythons[peer]} has no {' or '.join(NEEDS[peer])}; install them, or name "
                "another interpreter with --peer_python"
            )
    kinds = [("ours", 0, sys.executable), ("ours", 2, sys.executable)]
    kinds += [(peer, threads, pythons[peer]) for peer in args.peers for threads in (0, 2)]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "corpus"
        _make(folder, int(args.tokens), args.length)
        load_average, names, turns = os.getloadavg()[0], [], {}
        for number, (kind, threads, python) in enumerate(kinds):
            side = stack.enter_context(Side("tools.bench_data_sides", python=python))
            work = Path(temporary) / str(number)
            work.mkdir()
            shape = {"length": args.length, "rows": args.rows, "threads": threads}
            name = side.call("prepare", kind=kind, folder=str(folder), work=str(work), **shape)
            names.append((kind, name))
            turns[name] = partial(side.call, "read", steps=args.steps)
            if not number:
                rows = side.call(
                    "random_rows",
                    folder=str(folder),
                    work=str(work),
                    length=args.length,
                    count=20_000,
                )
            if kind == "ours" and threads:
                wait = side.call("wait", rate=2e5, steps=20)
        results = take_turns(turns, args.rounds)
    _report(names, results, rows, load_average)
    print(f"a loop of 200,000 positions/s waits for batches {wait:.3%} of its time")
    return 0


def _make(folder: Path, num_tokens: int, length: int) -> None:
    """Write a corpus of random documents, their median 400 tokens, and the plan of its rows."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6, 1.1, max(num_tokens // 300, 1)), 1).astype(np.int64) + 1
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]
    tokens = rng.integers(256, size=int(lengths.sum())).astype(np.uint16)
    tokenizer = tokenizers.Byte()
    tokens[np.cumsum(lengths) - 1] = tokenizer.end_of_text
    writer = Writer(folder, {"key": "synthetic"}, tokens.dtype, tokenizer.end_of_text)
    count = len(lengths)
    splits, origins = np.zeros(count, np.uint8), np.zeros(count, ORIGIN)
    nothing = (Counter[str](), np.full(count, None))
    writer.add(Encoded(tokens, lengths, lengths - 1, splits, origins, (1, 0), *nothing))
    writer.end_shard()
    writer.finish()
    tokenizer.save(folder / "tokenizer")
    counts = {"documents": count, "bytes": len(tokens), "tokens": len(tokens)}
    body = {
        "key": "synthetic",
        "fingerprint": "synthetic",
        "dtype": tokens.dtype.str,
        "settings": {},
        "report": {"labels": [], "paired": False, **dict.fromkeys(SPLITS, counts)},
        "parts": ["synthetic"],
        "files": {file.name: shards.recorded(file) for file in folder.glob("*-*.tokens")},
    }
    shards.write_manifest(folder, body)
    made = load(folder)
    plans = {
        split.name: packing.windows("best_fit", split.starts, split.num_inputs, length)
        for split in (made.train, made.validation)
    }
    packing.save(folder, "best_fit", length, plans, fingerprint="synthetic")


def _report(
    names: list[tuple[str, str]],
    results: dict[str, list[float]],
    rows: dict[str, float],
    load: float,
) -> None:
    """Print the rates of each side, and how many times those of the peers ours is."""
    if load > 0.5:
        print(f"busy: {load:.1f} processes ran here before; trust the ratios alone")
    for _, name in names:
        middle, low, high = (value / 1e6 for value in spread(results[name]))
        print(f"{name:44} {middle:8.2f} [{low:.2f}, {high:.2f}] million positions/s")
    best = {}
    for kind in dict(names):
        best[kind] = max(
            (results[name] for k, name in names if k == kind),
            key=lambda values: statistics.median(values),
        )
    for kind, theirs in best.items():
        if kind != "ours":
            ratios = [a / b for a, b in zip(best["ours"], theirs, strict=True)]
            print("ours over {}: {:.1f} [{:.1f}, {:.1f}]".format(kind, *spread(ratios)))
    ratio = rows["array_record"] / rows["memory_map"]
    print(
        f"random rows: memory-mapped shards {ratio:.1f} times as fast as ArrayRecord, one thread each"
    )


if __name__ == "__main__":
    sys.exit(main())
