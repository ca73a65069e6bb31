"""Prepare a corpus once, to train on it at once: clean, tokenize, split, plan the rows, write shards.

    python -m tools.prepare_data --config experiments/gpt_small.py --source 'text/*.jsonl.zst' --out corpora/a
    python -m tools.prepare_data --source text.jsonl --tokenizer byte --out corpora/b --workers 8

Killed at any point, the same command goes on and gives the same bytes. A run reads the corpus with
`--config.data.path=corpora/a`. Of a mixture each corpus is prepared in a folder of its own.
"""

import argparse
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm import command, tasks
from lm import config as config_lib
from lm.config import ConfigError
from lm.data import cleaning, corpus, plans, settings, sources

SCHEMA: config_lib.Schema = {
    "data": lambda section: settings.Config,
    "task": lambda section: tasks.config_class(section.get("name", "causal_lm")),
}


def main(argv: list[str] | None = None) -> int:
    """Read the flags, prepare, return the exit code."""
    assignments, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    parser = command.Parser(
        prog="python -m tools.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_epilog(),
    )
    parser.add_argument("--config", help="experiment whose sections data and task hold")
    parser.add_argument("--source", help="a source's name (data.source) or else a path (data.path)")
    parser.add_argument("--tokenizer", help="a kind of tokenizer, or the path of one")
    parser.add_argument("--out", required=True, help="folder to prepare the corpus in")
    parser.add_argument(
        "--workers", type=int, default=_cores(), help="processes (here %(default)s); 0 = none"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(rest)
    return command.exit_on_user_error(lambda: _run(args, assignments), debug=args.debug)


def _epilog() -> str:
    fields = command.help_text(SCHEMA, config_lib.complete(ConfigDict({"data": {}}), SCHEMA))
    return f"{fields}\n\n{cleaning.help_text()}"


def _cores() -> int:
    """Return how many cores this process may use: a cluster's scheduler may give it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(args: argparse.Namespace, assignments: list[str]) -> int:
    if args.workers < 0:
        raise ConfigError(f"--workers={args.workers}: use 0 or more")
    if not args.out:
        raise ConfigError("--out: no folder named; name one")
    cfg, task_cfg = _settings(args, assignments)
    out, start = Path(os.path.expanduser(args.out)), time.perf_counter()
    made = corpus.prepare_in(out, cfg, workers=args.workers)
    for folder in made:
        _plan(folder, task_cfg)
        print(f"{folder}: {corpus.load(folder).summary()}")
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{size:,} bytes on disk in {seconds:.1f} s")
    experiment = args.config or "experiments/gpt_tiny.py"
    print("look:  " + f"python -m tools.inspect_data {shlex.quote(str(made[0]))}")
    kept = "".join(
        f" --config.{shlex.quote(flag)}"
        for flag in assignments
        if flag.startswith(("task.", "data.mixture_"))
    )
    named = f"data.path={out}"
    if cfg.mixture:
        pairs = zip(made, cfg.mixture, strict=True)
        named = "data.mixture=" + ",".join(f"{folder}={weight!r}" for folder, (_, weight) in pairs)
    print(f"train: python -m lm.main --config {experiment} --config.{shlex.quote(named)}{kept}")
    return 0


def _settings(args: argparse.Namespace, assignments: list[str]) -> tuple[settings.Config, Any]:
    """Return the frozen sections data and task of the experiment and the flags."""
    config = ConfigDict({"data": {}, "task": {}})
    if args.config:
        whole = config_lib.load(args.config)
        config = ConfigDict({name: whole.get(name, {}) for name in SCHEMA}, type_safe=False)
    if args.source:
        assignments = [*_named(args.source, assignments), *assignments]
    if args.tokenizer:
        exists = os.path.exists(args.tokenizer)
        kind = ["data.tokenizer=file", f"data.tokenizer_path={args.tokenizer}"]
        assignments = [*(kind if exists else [f"data.tokenizer={args.tokenizer}"]), *assignments]
    config = config_lib.complete(config_lib.override(config, assignments, SCHEMA), SCHEMA)
    frozen: list[Any] = [
        config_lib.freeze(choose(config[name]), config[name], where=name)
        for name, choose in SCHEMA.items()
    ]
    return frozen[0], frozen[1]


def _named(source: str, assignments: list[str]) -> list[str]:
    """Return what `--source` sets: data.source by a source's name, data.path by anything else."""
    files = [item for item in assignments if item.startswith("data.path=")]
    if source in sources.NAMES and source not in sources.EMBEDDED:
        return [f"data.source={source}"]
    if files:
        raise ConfigError(f"--source={source}: --config.{files[0]} names another; give one of them")
    if source in sources.EMBEDDED:
        return [f"data.source={source}", "data.path="]
    return [f"data.path={source}"]


def _plan(folder: Path, cfg: Any) -> None:
    """Keep the plan of the task's rows with the corpus, where it has one."""
    text = corpus.load(folder)
    task = tasks.build(cfg, tasks.Setting(tasks.kinds(cfg)[0], text.tokenizer, text.labels))
    splits = (text.train, text.validation)
    kept = plans.Kept(folder, fingerprint=text.fingerprint, splits=splits, unchecked={})
    for split in splits:
        task.num_rows(dataclasses.replace(split, kept=kept.keep))


if __name__ == "__main__":
    sys.exit(main())
