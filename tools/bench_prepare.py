"""Measure how fast text is prepared, in turns with `datasets.map` on the same tokenizer and processes.

    python -m tools.bench_prepare text.jsonl --tokenizer tokenizer.json --workers 2

Both read JSON lines, encode the field "text" and write tokens to disk, each time in another process. Also
told: the share of the processor time of one process that is spent inside the tokenizer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from lm import command
from lm.config import ConfigError
from lm.data import corpus, external, tokenizers
from lm.data.settings import Config
from tools.bench import spread, take_turns


def main(argv: list[str] | None = None) -> int:
    """Read the flags, measure, print, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.bench_prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="JSON lines with a field text")
    parser.add_argument(
        "--tokenizer", required=True, help="a tokenizer.json, or a run's tokenizer/"
    )
    parser.add_argument(
        "--clean", default="", help="steps of data.clean for the share, with ; between"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of each side")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--side", choices=("ours", "datasets", "share"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.side:
        side = {"ours": _ours, "datasets": _datasets, "share": _share}[args.side]
        print(json.dumps(side(args)))
        return 0
    for name in ("workers", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)}: use 1 or more")
    external.open_tokenizer(args.tokenizer)
    turns = {name: partial(_turn, args, name) for name in ("ours", "datasets")}
    share = _turn(args, "share")
    results = take_turns(turns, args.rounds)
    size = Path(args.file).stat().st_size / 1e6
    for name, seconds in results.items():
        middle, low, high = spread([size / value for value in seconds])
        print(f"{name:10} {middle:6.2f} [{low:.2f}, {high:.2f}] MB/s with {args.workers} processes")
    ratios = [b / a for a, b in zip(results["ours"], results["datasets"], strict=True)]
    print("ours over datasets: {:.2f} [{:.2f}, {:.2f}]".format(*spread(ratios)))
    print(f"inside the tokenizer: {share:.1%} of the processor time of one process")
    return 0


def _turn(args: argparse.Namespace, side: str) -> float:
    """Return what a side measures, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        flags = [
            "--tokenizer",
            args.tokenizer,
            "--workers",
            str(args.workers),
            "--clean",
            args.clean,
        ]
        made = subprocess.run(
            [
                sys.executable,
                "-m",
                "tools.bench_prepare",
                args.file,
                *flags,
                "--side",
                side,
                "--out",
                out,
            ],
            capture_output=True,
            text=True,
        )
    if made.returncode:
        raise ConfigError(f"{side}: {(made.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(made.stdout.strip().splitlines()[-1])


def _config(args: argparse.Namespace, clean: str = "") -> Config:
    return Config(
        source="jsonl",
        path=(args.file,),
        tokenizer="file",
        tokenizer_path=args.tokenizer,
        clean=(clean,),
    )


def _ours(args: argparse.Namespace) -> float:
    """Return the seconds of a preparation."""
    start = time.perf_counter()
    corpus.prepare_in(Path(args.out), _config(args), workers=args.workers)
    return time.perf_counter() - start


def _datasets(args: argparse.Namespace) -> float:
    """Return the seconds of loading, mapping and saving; the tokenizer is the library's own object."""
    import datasets
    from tokenizers import Tokenizer

    path = Path(args.tokenizer)
    made = Tokenizer.from_file(str(path / "huggingface.json" if path.is_dir() else path))

    def encode(batch: dict) -> dict:
        return {
            "ids": [
                one.ids for one in made.encode_batch_fast(batch["text"], add_special_tokens=False)
            ]
        }

    tokenizers.use_one_thread()
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=args.file, split="train", cache_dir=args.out)
    mapped = rows.map(encode, batched=True, remove_columns=rows.column_names, num_proc=args.workers)
    mapped.save_to_disk(f"{args.out}/saved")
    return time.perf_counter() - start


def _share(args: argparse.Namespace) -> float:
    """Return the share of processor time spent in `encode_all`, in one process and thread."""
    from lm.data import prepare

    tokenizers.use_one_thread()
    inside, real = [0.0], prepare.Encoder.encode

    def timed(self, chunk, **options):
        encode_all = self.tokenizer.encode_all

        def measured(texts):
            start = time.process_time()
            ids = encode_all(texts)
            inside[0] += time.process_time() - start
            return ids

        self.tokenizer.encode_all = measured
        try:
            return real(self, chunk, **options)
        finally:
            del self.tokenizer.encode_all

    prepare.Encoder.encode = timed  # type: ignore[method-assign]
    start = time.process_time()
    corpus.prepare_in(Path(args.out), _config(args, args.clean))
    return inside[0] / (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main())
