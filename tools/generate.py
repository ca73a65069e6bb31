"""Continue text with a trained model: `python -m tools.generate --workdir DIR --prompt "Once upon"`."""

import argparse
import sys

from lm import command, startup
from lm.config import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Read the flags, print the continuations, return the exit code."""
    parser = command.Parser(
        prog="python -m tools.generate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", default="last", help="checkpoint: a number, last or best")
    parser.add_argument(
        "--prompt", action="append", help="text to continue; may be given several times"
    )
    parser.add_argument("--max_tokens", type=int, default=200, help="new tokens, at most")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 = the most probable token"
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=argparse.SUPPRESS,
        help="sample from the k best, 0 = all; of an encoder, answers to show (default: 50, or 5)",
    )
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="sample from this much probability; 1 = all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(argv)
    return command.exit_on_user_error(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.num_samples < 1:
        raise ConfigError(f"num_samples={args.num_samples}: use 1 or more")
    startup.prepare()
    from lm import checkpoint, complete, hardware
    from lm import workdir as workdirs
    from lm.data import corpus

    hardware.use_compilation_cache(corpus.cache_folder() / "programs")
    loaded = checkpoint.load(args.workdir, step=args.step)
    completer = workdirs.completer(args.workdir, loaded)
    prompts = [prompt for prompt in args.prompt or [""] for _ in range(args.num_samples)]
    alone = len(prompts) == 1 and completer.kind != "masked"
    top_k = getattr(args, "top_k", 5 if completer.kind == "masked" else 50)
    sampling = complete.Sampling(args.max_tokens, args.temperature, top_k, args.top_p, args.seed)
    completer.check(prompts, sampling)  # before a word is printed
    stream = _Stream(prompts[0], completer) if alone else None
    texts = completer.complete(prompts, sampling, on_tokens=stream)
    if stream:
        stream.finish()
        return 0
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        shown = prompt + text if completer.goes_on else f"{prompt}\n{text}"
        print(shown if len(texts) == 1 else f"--- {number} ---\n{shown}")
    return 0


class _Stream:
    """Prints one continuation as it comes; a character whose bytes are not all there yet waits."""

    def __init__(self, prompt: str, completer):
        self._tokens: list[int] = []
        self._prompt, self._completer, self._printed = prompt, completer, 0
        print(prompt if completer.goes_on else "", end="", flush=True)

    def __call__(self, row: int, new: list[int]) -> None:
        self._tokens += new
        text = self._text().rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)

    def finish(self) -> None:
        """Print what waited."""
        print(self._text()[self._printed :], flush=True)

    def _text(self) -> str:
        return self._completer.answer(self._prompt, self._tokens)


if __name__ == "__main__":
    sys.exit(main())
