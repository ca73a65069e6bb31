"""Look into a corpus, or at what a step of a run saw.

    python -m tools.inspect_data corpora/mine --out corpora/mine.png
    python -m tools.inspect_data --config experiments/gpt_tiny.py --rows 3
    python -m tools.inspect_data runs/mine --step 1000

Shows counts, lengths (a histogram, as a picture with --out), the most frequent tokens, how much of the
vocabulary is used, bytes per token, and rows decoded, with the borders of documents and what is scored. With
--step: the source, document and place of every row that the step trains on, or that the run left out.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lm import command, receipt, tasks
from lm import config as config_lib
from lm.config import ConfigError
from lm.data import corpus, origins, pipeline, shards
from tools.prepare_data import SCHEMA

_BARS = 24
_WIDTH = 40
_CHUNK = 1 << 24  # tokens counted at a time


def main(argv: list[str] | None = None) -> int:
    """Read the flags, print what is inside, return the exit code."""
    assignments, rest = command.split_flags(sys.argv[1:] if argv is None else argv)
    parser = command.Parser(
        prog="python -m tools.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Fields of the experiment are set by --config.SECTION.FIELD=VALUE.",
    )
    parser.add_argument("folder", nargs="?", help="a prepared corpus, or the workdir of a run")
    parser.add_argument("--config", help="an experiment, whose corpus is made where missing")
    parser.add_argument(
        "--step",
        type=int,
        help="show what a step trains on, counted from 0: row N + 1 of metrics.jsonl is of step N",
    )
    parser.add_argument("--rows", type=int, default=1, help="rows to decode")
    parser.add_argument("--tokens", type=int, default=12, help="most frequent tokens to show")
    parser.add_argument(
        "--verify", action="store_true", help="check every byte of a prepared corpus"
    )
    parser.add_argument(
        "--shards", action="store_true", help="show what is in each shard of a prepared corpus"
    )
    parser.add_argument("--out", help="PNG for the histogram of the documents' lengths")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes")
    args = parser.parse_args(rest)
    return command.exit_on_user_error(lambda: _run(args, assignments), debug=args.debug)


def _run(args: argparse.Namespace, assignments: list[str]) -> int:
    if bool(args.folder) == bool(args.config):
        raise ConfigError("name a folder or --config, one of them")
    for name in ("step", "rows", "tokens"):
        if (getattr(args, name) or 0) < 0:
            raise ConfigError(f"--{name}={getattr(args, name)}: use 0 or more")
    folder = Path(args.folder) if args.folder else None
    prepared = bool(folder and (folder / shards.MANIFEST).exists())
    if args.out and not args.out.endswith(".png"):
        raise ConfigError(f"--out={args.out}: a picture is a .png; name one")
    if args.verify and not prepared:
        raise ConfigError("--verify: only a prepared corpus has digests to check; name its folder")
    if args.shards and not prepared:
        raise ConfigError("--shards: only a prepared corpus has them; name its folder")
    if args.step is not None and prepared:
        raise ConfigError(
            f"--step={args.step}: a corpus has no steps; name a run's workdir, or an experiment by --config"
        )
    if args.step is not None:
        if args.out:
            raise ConfigError(f"--out={args.out}: a step has no histogram; leave it out")
        _show_step(_config(folder, args.config, assignments), args.step, folder)
        return 0
    if folder and prepared:
        text = corpus.load(folder, thorough=args.verify)
        if args.verify:
            print("every file is as its manifest says")
        if args.shards:
            _show_shards(folder)
        whole = config_lib.override(ConfigDict({"data": {}, "task": {}}), assignments, SCHEMA)
        config = whole
    else:
        whole = _config(folder, args.config, assignments)
        config = ConfigDict({name: whole.get(name, {}) for name in SCHEMA}, type_safe=False)
        text = corpus.build(_frozen(config, "data"))
        _check_trained_on(folder, text)
    task_cfg = _frozen(config, "task")
    for name, member in text.mixed or (("", text),):
        if name:
            print(f"\n=== {name}")
        _show(member, args.tokens)
        task = tasks.build(task_cfg, _setting(whole, task_cfg, member))
        if rows := min(args.rows, task.num_rows(member.train)):
            batch = task.rows(member.train, np.arange(rows))
            print("\n" + pipeline.describe_batch(batch, member.tokenizer, rows=rows))
    if args.out:
        _draw(text, Path(args.out))
        print(f"picture: {args.out}")
    return 0


def _config(folder: Path | None, experiment: str | None, assignments: list[str]) -> ConfigDict:
    """Return the config of a run's folder or of an experiment, with what is set by flags."""
    from lm import experiment as experiments

    if folder:
        file = folder / "config.json"
        if not file.is_file():
            raise ConfigError(
                f"{folder}: neither a prepared corpus (no {shards.MANIFEST}) nor a run (no config.json)"
            )
        config = config_lib.from_json(file.read_text(encoding="utf-8"), where=str(file))
    else:
        config = config_lib.load(str(experiment))
    return config_lib.override(config, assignments, experiments.SCHEMA)


def _setting(config: ConfigDict, task_cfg: Any, member: Any) -> tasks.Setting:
    """Return what the task of a run makes its rows with; of a corpus alone, the first kind that it makes."""
    from lm import models

    kinds, model = tasks.kinds(task_cfg), config.get("model", {})
    accepts = models.family(model["name"]).Model.accepts if "name" in model else frozenset(kinds)
    kind, start = tasks.kind_for(kinds, accepts), model.get("start_token", -1)
    return tasks.Setting(kind, member.tokenizer, member.labels, config.get("seed", 0), start)


def _frozen(config: ConfigDict, section: str) -> Any:
    config = config_lib.complete(config, SCHEMA)
    return config_lib.freeze(SCHEMA[section](config[section]), config[section], where=section)


def _show(text: corpus.Corpus, num_tokens: int) -> None:
    """Print counts, lengths, and how the tokenizer fits."""
    report, tokenizer = text.report, text.tokenizer
    print(text.summary())
    print(f"fingerprint {text.fingerprint}; split by {report['split']}")
    for step, counts in report.get("clean", {}).items():
        removed = counts["characters_before"] - counts["characters_after"]
        print(
            f"  {step}: of {counts['documents']:,} documents changed {counts['changed']:,} and dropped "
            f"{counts['dropped']:,}; {removed:,} characters fewer"
        )
        for reason, number in sorted(counts["reasons"].items(), key=lambda item: -item[1]):
            print(f"    {number:>8,} {reason}")
    for reason, number in report.get("broken", {}).items():
        print(f"  skipped: {number:,} {reason}")
    for split in (text.train, text.validation):
        if not len(split.starts):
            continue
        counts = _count(split, tokenizer.vocab_size)
        used, total = np.count_nonzero(counts), max(int(counts.sum()), 1)
        ids = tokenizer.vocab_size - 1  # but the end of text, which is not counted
        size = split.num_bytes / max(split.num_inputs - len(split.starts), 1)
        print(
            f"\n{split.name}: {len(split.starts):,} documents, {split.num_inputs:,} tokens, "
            f"{split.num_bytes:,} bytes, {size:.2f} bytes a token; {used:,} of "
            f"{ids:,} ids used ({used / ids:.1%})"
        )
        best = np.argsort(-counts, kind="stable")[:num_tokens]
        words = [f"{tokenizer.piece(i)!r} {counts[i] / total:.2%}" for i in best if counts[i]]
        print("most frequent: " + ", ".join(words))
        for line in _histogram(_lengths(split)):
            print(line)


def _show_shards(folder: Path) -> None:
    """Print what the manifest says of each shard."""
    counts = shards.read_manifest(folder).get("shards")
    if counts is None:
        raise ConfigError(
            "--shards: the corpus was prepared before they were counted; leave it out"
        )
    for name, shard in counts.items():
        print(f"  {name}: {shard['documents']:,} documents, {shard['tokens']:,} tokens")


def _count(split: corpus.Split, vocab_size: int) -> np.ndarray:
    """Return how often each id stands in the split, ends of text left out."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(1, len(split.tokens), _CHUNK):
        counts += np.bincount(split.tokens[begin : begin + _CHUNK], minlength=vocab_size)
    counts[split.end_of_text] = 0
    return counts


def _lengths(split: corpus.Split) -> np.ndarray:
    """Return the tokens of each document."""
    return np.diff(np.append(split.starts, split.num_inputs)) - 1


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Return the edges of bins that grow with the lengths."""
    top = max(int(lengths.max(initial=1)), 2)
    return np.unique(np.geomspace(1, top + 1, _BARS + 1).astype(np.int64))


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield lines of a histogram of documents' lengths in tokens."""
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 1], method="inverted_cdf").astype(int)
    least, median, ninety, most = (f"{value:,}" for value in quantiles)
    yield f"tokens a document: least {least}, median {median}, 90% up to {ninety}, most {most}"
    edges = _edges(lengths)
    counts, _ = np.histogram(lengths, edges)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(_WIDTH * count / max(counts.max(), 1))
        yield f"  {low:>10,} to {high - 1:>10,} {count:>10,} {bar}".rstrip()


def _draw(text: corpus.Corpus, out: Path) -> None:
    """Draw the lengths of the documents of each corpus and split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, member in text.mixed or (("", text),):
        for split in (member.train, member.validation):
            if len(split.starts):
                lengths = _lengths(split)
                axes.hist(
                    np.maximum(lengths, 1),
                    bins=_edges(lengths).tolist(),
                    histtype="step",
                    label=f"{name} {split.name}: {len(lengths):,} documents".strip(),
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="documents",
        title="Lengths of documents",
    )
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def _check_trained_on(folder: Path | None, text: corpus.Corpus) -> None:
    """Refuse another text than the run in `folder` was trained on."""
    described = folder / "data.json" if folder else None
    known = receipt.read_json(described) if described and described.exists() else {}
    if known.get("fingerprint", text.fingerprint) != text.fingerprint:
        raise ConfigError(
            "data.path: the run was trained on other text than is there now; bring it back"
        )


def _left_out(folder: Path | None, step: int) -> str:
    """Return why the run in `folder` skipped `step`; nothing where it did not."""
    from lm import guard

    listed = folder / guard.FILE if folder else None
    if not listed or not listed.exists():
        return ""
    return receipt.read_json(listed, sealed=True).get(str(step), "")


def _show_step(config: ConfigDict, step: int, folder: Path | None) -> None:
    """Print where each row of the batch of `step` comes from."""
    from lm import experiment

    # Which rows a batch has does not depend on devices: a pod's run can be looked at anywhere.
    here = ConfigDict({name: part for name, part in config.items() if name != "mesh"})
    made = experiment.build(config_lib.complete(here, experiment.SCHEMA))
    if step >= made.num_steps:
        raise ConfigError(f"--step={step}: the run has {made.num_steps} steps, counted from 0")
    _check_trained_on(folder, made.corpus)
    found = origins.of_step(made.batches, made.corpus.members, made.corpus.names, step)
    print(f"step {step} of {made.num_steps}: {len(found)} rows")
    if why := _left_out(folder, step):
        print(f"  which the run left out: {why}; nothing was learned from them")
    for place, row in enumerate(found):
        print(f"row {place}: {row['row']}")
        for line in row["documents"]:
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
