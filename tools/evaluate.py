"""Score a trained model: `python -m tools.evaluate --workdir DIR [--config.data.path=text.txt]`.

Without a path, on the validation split of its own data, as much of it as in training (`eval.max_tokens`);
with `data.path` or `data.source`, on all of that text, in the model's own tokens; of a prepared corpus, or
with `data.fold` or `data.validation_path`, on what that has for validation.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm import command, startup
from lm import config as config_lib


def main(argv: list[str] | None = None) -> int:
    """Read the flags, print the scores, return the exit code."""
    assignments, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    parser = command.Parser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Fields of the sections data, eval and mesh are set by --config.SECTION.FIELD=VALUE.",
    )
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", default="last", help="checkpoint: a number, last or best")
    parser.add_argument("--json", metavar="FILE", help="write the scores there too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(rest)
    return command.exit_on_user_error(lambda: _run(args, assignments), debug=args.debug)


# What says which text is read and how much of it, besides the names of its fields.
_OF_THE_TEXT = ("source", "dataset_config", "dataset_split", "revision", "mixture", "mixture_stages",
                "mixture_temperature", "validation_path", "clean", "fold")  # fmt: skip
_OF_TRAINING = (
    "data.epochs", "data.prefetch_threads", "data.prefetch_batches", "eval.every_steps",
    "eval.timeout_seconds", "mesh.local_steps",
)  # fmt: skip


def _take_whole(config: Any, assignments: list[str]) -> list[str]:
    """Let a run's corpus be all of another text as it is, read as `assignments` say; return these and more.

    Nothing is left of how the run read its own, but for the fields of records, where this has some too.
    """
    from lm.data import settings, shards, sources

    given = dict(assignment.partition("=")[::2] for assignment in assignments)
    path = tuple(given.get("data.path", "").split(","))
    source = sources.resolve(
        given.get("data.source", settings.Config.source), path if path[0] else ()
    )
    reset = _OF_THE_TEXT if source in sources.WITH_FIELDS else (*_OF_THE_TEXT, *settings.FIELDS)
    for name in reset:
        config.data[name] = getattr(settings.Config, name)
    if "data.path" not in given:
        config.data.path = ()
    config.eval.max_tokens = 0
    split = {"data.validation_fraction", "data.fold", "data.validation_path"} & given.keys()
    if split or (len(path) == 1 and shards.is_prepared(path[0])):
        return assignments
    return [*assignments, "data.validation_fraction=1"]


def _run(args: argparse.Namespace, assignments: list[str]) -> int:
    startup.prepare()
    import jax

    from lm import checkpoint, evaluate, experiment, fit, hardware, manifests, sharding, step
    from lm.data import corpus, tokenizers
    from lm.receipt import read_json

    given = [assignment.partition("=")[0] for assignment in assignments]
    for key in given:
        section, _, name = key.partition(".")
        of_tokenizer = section == "data" and name in corpus.OF_TOKENIZER
        if section not in ("data", "eval", "mesh") or of_tokenizer:
            raise config_lib.ConfigError(
                f"{key}: a trained model has it fixed; only data, eval and mesh can be set here"
            )
        if key in _OF_TRAINING:
            raise config_lib.ConfigError(f"{key}: used only in training; leave it out")
    other = {"data.path", "data.source"} & set(given)
    hardware.use_compilation_cache(corpus.cache_folder() / "programs")
    config, model, params = checkpoint.load(args.workdir, step=args.step)
    if other:
        assignments = _take_whole(config, assignments)
    config = config_lib.complete(
        config_lib.override(config, assignments, experiment.SCHEMA), experiment.SCHEMA
    )
    cfg = experiment.freeze(config)
    mesh = sharding.make_mesh(cfg["mesh"])
    kind = fit.check_sections(cfg, mesh, training=False)
    tokenizer = tokenizers.load(Path(args.workdir) / "tokenizer")
    text = corpus.build(cfg["data"], tokenizer=tokenizer)
    described = read_json(Path(args.workdir) / "data.json")
    labels = described.get("labels", ())
    if unknown := sorted(set(text.labels) - set(labels)):
        raise config_lib.ConfigError(
            f"data.label_field: {unknown[0]!r} is none of the {len(labels)} labels that the model was "
            "trained for; leave its texts out"
        )
    task = experiment.build_task(cfg, kind, tokenizer, labels, seed=config.seed)
    if not other and text.fingerprint != described.get("fingerprint"):
        print(
            "notice: this validation split is not the run's own (another Python's text, or a changed file "
            "or setting)",
            file=sys.stderr,
        )
    objective = experiment.build_objective(task)
    with sharding.use(mesh):
        if model.learns == "gradient":
            axes, shapes = step.parameter_axes(model)
            params = jax.device_put(params, sharding.shardings(mesh, axes, shapes))
        eval_step = experiment.jit_eval_step(model, objective)
        bar = functools.partial(tqdm, desc="evaluating", unit=" batches", delay=2, disable=None)
        scores = evaluate.score(model, eval_step, params, text, task, cfg, mesh, bar)
    for name, value in scores.items():
        print(f"{name:<14} {value:,.6g}")
    if args.json:
        manifests.write_whole(Path(args.json), json.dumps(scores, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
