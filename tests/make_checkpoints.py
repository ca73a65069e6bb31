"""Make the fixture of the present format: a tiny gpt after a few steps.

    PYTHONPATH=. XLA_FLAGS= python tests/make_checkpoints.py FOLDER

Trains in FOLDER, a new one, whose name Orbax writes into the checkpoint. Writes
tests/fixtures/checkpoints/<format>/, which is committed once and then never made anew: what a version has
written must load for ever.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from ml_collections import ConfigDict

from lm import manifests, train

FOLDER = Path(__file__).parent / "fixtures" / "checkpoints"
TEXT = "the cat sat on the mat and the dog ran to the red house by the sea.\n" * 40


def config() -> ConfigDict:
    """Return the config of the run."""
    return ConfigDict({
        "data": {"path": ("text.txt",), "tokenizer": "byte", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 8, "num_heads": 2},
        "optim": {"name": "adamw", "peak_lr": 1e-2, "warmup": 2},
        "train": {"num_steps": 4, "log_every_steps": 1, "sample_tokens": 0},
        "eval": {"every_steps": 4, "max_tokens": 512},
        "checkpoint": {"every_steps": 2, "keep": 1},
        "mesh": {"data": 1},
    }, type_safe=False)  # fmt: skip


def main() -> None:
    """Train, and keep what a run needs to be loaded and to go on."""
    target, folder = FOLDER / str(manifests.FORMAT), Path(sys.argv[1])
    if target.exists():
        raise SystemExit(f"{target} is there already: it is never made anew")
    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("text.txt").write_text(TEXT)
    scores = train.run(config(), "run")
    target.mkdir(parents=True)
    shutil.copy("text.txt", target)
    for name in ("checkpoints", "tokenizer"):
        shutil.copytree(Path("run") / name, target / name)
    for name in ("config.json", "data.json"):
        shutil.copy(Path("run") / name, target)
    (target / "expected.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
