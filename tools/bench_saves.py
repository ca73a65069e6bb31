"""Measure how long a save holds a run up, in turns with the asynchronous manager of Orbax on the same state.

    python -m tools.bench_saves --megabytes 500

A state of large and small arrays changes before every save, so that nothing is written twice. Told of
each side: the seconds until the call returns, which a step waits for, and until the checkpoint is written.
"A step meanwhile" is of work that goes on while a save is written.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm import checkpoint, command
from tools.bench import spread

MATRIX = 1024  # rows and columns of a large array; each has a small one beside it


def main(argv: list[str] | None = None) -> int:
    """Read the flags, measure, print, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.bench_saves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=int, default=500, help="of the state")
    parser.add_argument("--saves", type=int, default=8, help="of each side")
    parser.add_argument(
        "--folder", default=None, help="on the disk to measure; default: of the system"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.megabytes < 4 or args.saves < 1:
        raise checkpoint.ConfigError("--megabytes: use 4 or more; --saves: use 1 or more")
    state = _state(args.megabytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = checkpoint.Checkpointer(Path(folder) / "ours", checkpoint.Config(keep=1))
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
        manager = ocp.CheckpointManager(Path(folder) / "orbax", options=options)
        sides: dict[str, tuple[Callable, Callable]] = {
            "ours": (lambda at, tree: saver.save(at, tree, {}), saver.wait),
            "orbax": (
                lambda at, tree: manager.save(at, args=ocp.args.StandardSave(tree)),
                manager.wait_until_finished,
            ),
        }
        seconds = _measure(sides, state, args.saves)
        saver.close()
        manager.close()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(f"a state of {size:.0f} MB in {len(jax.tree.leaves(state))} arrays")
    for name, (blocked, written, step) in seconds.items():
        for what, values in (
            ("blocks", blocked),
            ("written after", written),
            ("a step meanwhile", step),
        ):
            print("{:6} {:17} {:8.4f} [{:.4f}, {:.4f}] s".format(name, what, *spread(values)))
    for number, what in enumerate(("blocking", "until written", "a step meanwhile")):
        ratios = [
            a / b for a, b in zip(seconds["ours"][number], seconds["orbax"][number], strict=True)
        ]
        print("ours over orbax, {}: {:.2f} [{:.2f}, {:.2f}]".format(what, *spread(ratios)))
    return 0


def _measure(
    sides: dict[str, tuple[Callable, Callable]], state: Any, saves: int
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Return of each side the seconds that each save blocks, is written in, and that steps take meanwhile."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001 + 1e-4, tree))
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y / MATRIX), x))
    matrix = jnp.ones((MATRIX, MATRIX))
    jax.block_until_ready(work(matrix))
    found: dict[str, tuple[list[float], list[float], list[float]]] = {
        name: ([], [], []) for name in sides
    }
    for at in range(saves + 1):
        names = list(sides) if at % 2 else list(sides)[::-1]
        for name in names:
            save, wait = sides[name]
            state = jax.block_until_ready(step(state))
            begin = time.perf_counter()
            save(at, state)
            blocked = time.perf_counter()
            jax.block_until_ready(work(matrix))
            worked = time.perf_counter()
            wait()
            if at:  # the first one compiles and makes folders
                values = (blocked - begin, time.perf_counter() - begin, worked - blocked)
                for known, value in zip(found[name], values, strict=True):
                    known.append(value)
    return found


def _state(megabytes: int) -> dict[str, Any]:
    count = max(1, megabytes * 250_000 // (MATRIX * MATRIX))
    keys = jax.random.split(jax.random.key(0), count)
    return {
        f"layer{i}": {"kernel": jax.random.normal(key, (MATRIX, MATRIX)), "scale": jnp.ones(MATRIX)}
        for i, key in enumerate(keys)
    }


if __name__ == "__main__":
    raise SystemExit(main())
