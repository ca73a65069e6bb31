"""A preparation that is killed at any of its steps ends, started again, with the same files and bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data import corpus

# (module, name in it, when, which call, workers): where the process kills itself.
POINTS = [
    ("prepare", "train", "after", 1, 0),
    ("prepare", "train", "after", 1, 2),
    ("tokenizers", "Tokenizer.save", "after", 1, 0),
    ("manifests", "sync", "before", 1, 0),
    ("prepare", "_tokenizer", "after", 1, 0),
    ("prepare", "Writer.add", "after", 9, 0),
    ("prepare", "Writer.add", "after", 9, 2),
    ("prepare", "Writer.end_shard", "before", 2, 0),
    ("prepare", "Writer.end_shard", "after", 2, 0),
    ("prepare", "_finish", "before", 1, 0),
    ("shards", "write_whole", "before", 1, 0),
    ("shards", "write_manifest", "after", 1, 0),
    ("prepare", "_finish", "after", 1, 0),
    ("packing", "Path.mkdir", "after", 5, 0),
    ("packing", "os.replace", "before", 3, 0),
    ("packing", "os.replace", "after", 3, 0),
]
RUN = """
import functools, json, os, signal, sys
from pathlib import Path
from lm import manifests
from lm.data import corpus, packing, prepare, shards, tokenizers
from lm.data.settings import Config
prepare.CHUNK, prepare.SHARD = 2000, 12_000

def arm(module, name, when, number):
    *outer, name = name.split(".")
    owner = functools.reduce(getattr, outer, globals()[module])
    call, calls = getattr(owner, name), []
    def armed(*args, **options):
        calls.append(0)
        if len(calls) == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **options)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, armed)

def run(source, folder, workers):
    corpus.prepare_in(folder, Config(path=(source,), vocab_size=320), workers=workers)
    built = corpus.load(folder)
    plans = {
        s.name: packing.windows("best_fit", s.starts, s.num_inputs, 32)
        for s in (built.train, built.validation)
    }
    packing.save(folder, "best_fit", 32, plans, fingerprint=built.fingerprint)

if __name__ == "__main__":
    source, folder, points = sys.argv[1:]
    for number, point in enumerate([None, *json.loads(points)]):
        for again in range(1 if point is None else 2):
            if child := os.fork():
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
                continue
            if point and not again:
                arm(*point[:4])
            run(source, Path(folder) / str(number), point[4] if point else 0)
            os._exit(0)
"""


def files(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a preparation that nothing killed, `0`, and one for each point that was gone on with."""
    place = tmp_path_factory.mktemp("kills")
    lines = [f"document {i} of many, " * (1 + i % 13) for i in range(400)]
    text = place / "a.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (place / "run.py").write_text(RUN)
    command = [sys.executable, str(place / "run.py"), str(text), str(place), json.dumps(POINTS)]
    path = os.environ | {"PYTHONPATH": str(Path(corpus.__file__).parents[2])}
    ended = subprocess.run(command, env=path, capture_output=True, text=True, timeout=300)
    assert ended.stdout.split() == ["0"] + ["-9", "0"] * len(POINTS), ended.stderr
    return place


@pytest.mark.parametrize("number", range(len(POINTS)), ids=["-".join(map(str, p)) for p in POINTS])
def test_what_was_killed_and_started_again_has_the_files_of_what_was_not(made, number):
    whole, gone_on = files(made / "0"), files(made / str(number + 1))
    assert "rows/best_fit-32/about.json" in whole and "train-00004.tokens" in whole
    assert sorted(gone_on) == sorted(whole)
    assert gone_on == whole
