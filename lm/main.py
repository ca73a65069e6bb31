"""Train the model of an experiment file: `python -m lm.main --config experiments/gpt_tiny.py`."""

import argparse
import contextlib
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path

from lm import command, distributed, exits, startup
from lm import config as config_lib


def main(argv: list[str] | None = None) -> int:
    """Run an experiment; return the exit code (see `lm.exits`)."""
    assignments, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    parser = command.Parser(
        prog="python -m lm.main", description=__doc__, add_help=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", metavar="FILE", help="experiment file; fields: --config.SECTION.FIELD=VALUE"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="resumed where it holds a checkpoint; default runs/<experiment>/<time>",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print config, parameters and a batch; train nothing"
    )
    parser.add_argument(
        "--coordinator_address", default="", metavar="HOST:PORT", help="of process 0 of several"
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="1 = alone in any cluster")
    parser.add_argument("--process_id", type=int, metavar="I", help="this one's number, from 0")
    parser.add_argument(
        "--swept", default="", metavar="FIELDS", help="which fields a sweep sets, for the receipt"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    parser.add_argument(
        "--help", "-h", action="store_true", help="show this, and every field of the config"
    )
    args = parser.parse_args(rest)
    return command.exit_on_user_error(lambda: _run(args, assignments, parser), debug=args.debug)


def _run(args: argparse.Namespace, assignments: list[str], parser: argparse.ArgumentParser) -> int:
    if not args.config and not args.help:
        raise config_lib.ConfigError(
            "--config: missing; give an experiment file, such as experiments/gpt_tiny.py"
        )
    if args.workdir is not None:
        command.check_folder("--workdir", args.workdir)
    startup.prepare()
    # Here, so that a typing mistake is told without waiting for jax.
    from lm import description, experiment, fit, train

    config = config_lib.load(args.config) if args.config else config_lib.ConfigDict()
    config = config_lib.override(config, assignments, train.SCHEMA)
    fit.check_given(config, assignments)
    if args.help:
        print(parser.format_help())
        print(command.help_text(train.SCHEMA, config))
        return 0
    said = experiment.prepare(config)
    distributed.start(
        args.coordinator_address,
        args.num_processes,
        args.process_id,
        timeout=experiment.section(config, "train").peer_timeout_seconds,
    )
    if args.dry_run:
        print("\n".join([*said, description.describe(experiment.build(config))]))
        return 0
    return _train(args, config, assignments, said)


@command.unread_goes_on()
def _train(
    args: argparse.Namespace,
    config: config_lib.ConfigDict,
    assignments: list[str],
    said: list[str],
) -> int:
    from lm import experiment, manifests, train

    print("\n".join(said), end="\n" if said else "")
    patience = experiment.section(config, "train").peer_timeout_seconds
    with distributed.deadline(max(distributed.START_SECONDS, patience)):
        stamp = distributed.from_first(time.strftime("%Y%m%d-%H%M%S"))
    workdir = Path(args.workdir or Path("runs") / Path(args.config).stem / stamp)
    fields = [f"--config.{assignment}" for assignment in assignments]
    words = ["python", "-m", "lm.main", "--config", args.config, "--workdir", str(workdir), *fields]
    again = shlex.join(words)
    try:
        train.run(config, workdir, _origins(assignments, args.swept))
    except exits.Ended as end:
        if end.error:
            print(f"error: {end}", file=sys.stderr)
        else:
            print(f"{end}; to resume: {again}")
        return end.code
    except KeyboardInterrupt as interrupt:
        print(f"stopped before the first step; nothing is lost; to start again: {again}")
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except OSError as error:
        kept = ""
        with contextlib.suppress(OSError):  # again: of what is wrong
            if manifests.good_steps(workdir / "checkpoints"):
                kept = "; the last good checkpoint is kept"
        raise config_lib.ConfigError(f"workdir={workdir}: {error}{kept}") from error
    print(f"workdir: {workdir}")
    prompt = "The [MASK]" if config.get("task", {}).get("name") == "masked_lm" else "The"
    place = shlex.quote(str(workdir))
    print(f'next:    python -m tools.generate --workdir {place} --prompt "{prompt}"')
    print(f"         python -m tools.plot --workdir {place}")
    return exits.FINISHED


def _origins(assignments: list[str], swept: str) -> dict[str, str]:
    """Return where the value of each field that is assigned comes from."""
    names = [assignment.partition("=")[0] for assignment in assignments]
    return {name: "sweep" if name in swept.split(",") else "command line" for name in names}


if __name__ == "__main__":
    exits.ENDS_WITH_RUN.set(True)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Until a run has its own: what jax calls while it is imported swallows a KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        code = main()
    except Exception:  # of several processes, one that waits for the others would not end at once
        traceback.print_exc()
        code = exits.FAILED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and saved; what is left is to end
    distributed.leave(code)
