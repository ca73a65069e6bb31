"""Turn a Hugging Face folder into a run, or a run into a Hugging Face folder.

    python -m tools.convert --from gpt2 --to runs/gpt2      (then tools.generate, or train.init_from)
    python -m tools.convert --from runs/mine --to mine_hf   (then from_pretrained of transformers)

What --from is decides the way. Weights are read from safetensors only, and their numbers do not change.
"""

import argparse
import shlex
import sys
from pathlib import Path

from lm import command, startup
from lm.config import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Read the flags, convert, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, help="folder to read")
    parser.add_argument("--to", dest="target", required=True, help="folder to make")
    parser.add_argument("--step", default="last", help="of a run: a number, last or best")
    parser.add_argument(
        "--tokenizer",
        default="",
        help="tokenizer.json, llama2.c's .bin or a folder, if --from has none",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    command.check_folder("--to", args.target)
    startup.prepare()
    from lm.convert import exporter, importer

    is_run = (Path(args.source) / "checkpoints").is_dir()
    if is_run and args.tokenizer:
        raise ConfigError(
            f"--tokenizer {args.tokenizer}: the run {args.source} has a tokenizer; leave it out"
        )
    if not is_run and args.step != "last":
        raise ConfigError(f"--step {args.step}: --from {args.source} is no run; leave it out")
    if is_run:
        made = exporter.from_run(args.source, args.target, args.step)
        following = f"from_pretrained({args.target!r}) of transformers' class"
    else:
        made = importer.to_run(args.source, args.target, args.tokenizer)
        prompt = ' --prompt "The [MASK]"' if made.architecture in ("bert", "roberta") else ""
        following = f"python -m tools.generate --workdir {shlex.quote(args.target)}{prompt}"
    print(
        f"{made.architecture}: {made.num_parameters:,} parameters in {made.dtypes}, tokenizer "
        f"{made.tokenizer} -> {args.target}"
    )
    if made.left_out:
        print(f"not copied: {made.left_out}")
    print(f"next: {following}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
