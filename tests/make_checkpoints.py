"""Make fixtures of the present format: tiny checkpoints of every kind of state.

    export PYTHONPATH=. XLA_FLAGS=--xla_force_host_platform_device_count=2
    python tests/make_checkpoints.py FOLDER            # those that are not there yet
    python tests/make_checkpoints.py FOLDER --format   # the one of a new format

Trains in FOLDER, a new one, whose name Orbax writes into the checkpoints. Writes
tests/fixtures/checkpoints/<format>/ or tests/fixtures/states/<name>/, which are committed once and then never
made anew: what a version has written must load for ever. Of states the next step is taken too:
expected.json has the scores at the checkpoint and after it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from lm import manifests, train
from lm.data import pipeline

FOLDER = Path(__file__).parent / "fixtures" / "checkpoints"
STATES = Path(__file__).parent / "fixtures" / "states"
TEXT = "the cat sat on the mat and the dog ran to the red house by the sea.\n" * 40
SAVED, BAD = 4, 2  # the step that is kept; the one that is left out before it
SKIPPING = {"on_bad_step": "skip", "spike_zscore": 100.0}
SIZE = {"model_dim": 4, "num_heads": 2, "mlp_dim": 8}
KINDS = {
    "gpt_skipped": {
        "model": {"name": "gpt", "num_layers": 2, "scan": True, **SIZE},
        "optim": {"ema_decay": 0.9},
        "train": SKIPPING,
        "mesh": {"data": -1, "fsdp": 2},
    },
    "gpt_groups": {
        "model": {"name": "gpt", "num_layers": 1, **SIZE},
        "optim": {"name": "sgd"},
        "mesh": {"dcn": 2, "data": -1, "local_steps": 3},
    },
    "lstm_carry": {
        "data": {"order": "stream"},
        "model": {"name": "rnn", "cell": "lstm", "num_layers": 2, "model_dim": 4},
        "eval": {"streams": 8},
    },
    "ngram": {"task": {"name": "causal_lm", "context": 2}, "model": {"name": "ngram", "order": 3}},
    "bert": {
        "task": {"name": "masked_lm", "next_sentence": True},
        "optim": {"name": "lion"},
        "model": {"name": "bert", "num_layers": 1, "next_sentence": True, **SIZE},
    },
    "t5": {
        "task": {"name": "span_corruption", "source_length": 16},
        "optim": {"name": "adafactor"},
        "model": {"name": "t5", "num_layers": 1, "head_dim": 4, **SIZE},
    },
}


def config() -> ConfigDict:
    """Return the config of the run of a format."""
    return ConfigDict({
        "data": {"path": ("text.txt",), "tokenizer": "byte", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 8, "num_heads": 2},
        "optim": {"name": "adamw", "peak_lr": 1e-2, "warmup": 2},
        "train": {"num_steps": 4, "log_every_steps": 1, "sample_tokens": 0},
        "eval": {"every_steps": 4, "max_tokens": 512},
        "checkpoint": {"every_steps": 2, "keep": 1},
        "mesh": {"data": -1},
    }, type_safe=False)  # fmt: skip


def config_of(name: str) -> ConfigDict:
    """Return the config of the run of a kind of state: a step longer than what is kept of it."""
    made = config()
    made.data.tokenizer = "char"
    made.train.num_steps, made.checkpoint.every_steps, made.checkpoint.keep = SAVED + 1, SAVED, 9
    kind = {"task": {"name": "causal_lm"}, **KINDS[name]}
    made.task = kind.pop("task") | ({"length": 16} if name != "t5" else {})
    made.model = kind.pop("model")
    for section, values in kind.items():
        made[section].update(values)
    return made


def poisoned(batches: pipeline.Batches, number: int, original=pipeline.Batches.__getitem__):
    """Return a batch, which is bad where `number` is BAD."""
    batch = original(batches, number)
    return {**batch, "weights": batch["weights"] * np.float32(np.nan if number == BAD else 1)}


def keep(target: Path, step: int, expected: dict[str, float]) -> None:
    """Copy what a run needs to be loaded and to go on from `step`."""
    target.mkdir(parents=True)
    shutil.copy("text.txt", target)
    shutil.copytree(Path("run") / "tokenizer", target / "tokenizer")
    shutil.copytree(Path("run/checkpoints") / str(step), target / "checkpoints" / str(step))
    for name in ("config.json", "data.json"):
        shutil.copy(Path("run") / name, target)
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_state(name: str) -> None:
    """Train in a folder of its own, and keep the checkpoint before its last step."""
    os.makedirs(name)
    os.chdir(name)
    Path("text.txt").write_text(TEXT)
    made = config_of(name)
    if made.train.get("on_bad_step") == "skip":
        pipeline.Batches.__getitem__ = poisoned
    scores = train.run(made, "run")
    pipeline.Batches.__getitem__ = poisoned.__defaults__[0]
    saved = manifests.read(Path("run/checkpoints"), SAVED)["metrics"]
    kept = {n: x for n, x in scores.items() if n.partition("/")[0] in ("train", "eval", "eval_raw")}
    keep(STATES / name, SAVED, {"saved": saved, "after": kept})
    os.chdir("..")


def main() -> None:
    """Make what is not there."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    if "--format" not in sys.argv:
        for name in KINDS:
            if not (STATES / name).exists():
                make_state(name)
        return
    if (target := FOLDER / str(manifests.FORMAT)).exists():
        raise SystemExit(f"{target} is there already: it is never made anew")
    Path("text.txt").write_text(TEXT)
    keep(target, 4, train.run(config(), "run"))


if __name__ == "__main__":
    main()
