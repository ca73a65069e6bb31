"""A plan of rows is made at the first start that needs it, and then read."""

import concurrent.futures
import json
import os
import time

import numpy as np
import pytest

from lm.data import corpus, packing, plans, shards
from lm.data.settings import Config
from lm.data.shards import SPLITS

PLAN = ("best_fit", 32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """The plans that were made, in order."""
    windows, found = packing.windows, []

    def counted(name, starts, num_inputs, capacity):
        found.append((name, capacity, num_inputs))
        yield from windows(name, starts, num_inputs, capacity)

    monkeypatch.setattr(packing, "windows", counted)
    return found


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "a.jsonl"
    words = np.random.default_rng(0).choice(["tree", "house", "river"], 3000).tolist()
    lines = [" ".join(words[at : at + 1 + at % 29]) for at in range(0, 3000, 15)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Config(path=(str(file),), tokenizer="byte")


def started(cfg, *plan):
    """Return the rows of both splits as a start sees them."""
    built = corpus.build(cfg)
    both = [getattr(built, split).plan(*(plan or PLAN)) for split in SPLITS]
    return [[each.pieces(row) for row in range(each.num_rows)] for each in both]


def test_a_second_start_reads_the_plan_of_raw_text(cache, text, made):
    first = started(text)
    assert [plan[:2] for plan in made] == [PLAN] * 2
    assert started(text) == first and len(made) == 2
    started(text, "pad", 32), started(text, "best_fit", 33)
    assert len(made) == 6
    assert started(text) == first and len(made) == 6
    expected = packing.make(*PLAN[:1], *inputs_of(text), PLAN[1])
    assert first[0] == [expected.pieces(row) for row in range(expected.num_rows)]


def inputs_of(cfg):
    split = corpus.build(cfg).train
    return split.starts, split.num_inputs


def test_so_does_one_of_a_corpus_prepared_for_other_rows(tmp_path, cache, text, made):
    folder = tmp_path / "prepared"
    corpus.prepare_in(folder, text)
    before = sorted(folder.rglob("*"))
    first = started(Config(path=(str(folder),)))
    assert len(made) == 2
    assert started(Config(path=(str(folder),))) == first and len(made) == 2
    assert sorted(folder.rglob("*")) == before, "a run writes nothing into it"
    assert started(text) == first and len(made) == 2, "of the same tokens"


def test_starts_at_once_make_it_once(cache, text, made, monkeypatch):
    corpus.build(text)
    save = packing.save
    slowly = lambda *args, **options: time.sleep(0.1) or save(*args, **options)  # noqa: E731
    monkeypatch.setattr(packing, "save", slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: started(text), range(4)))
    assert len(made) == 2 and all(each == found[0] for each in found)


@pytest.mark.parametrize("damage", ["train.begins", "about.json", "missing"])
def test_a_damaged_one_is_made_again(cache, text, made, damage):
    first = started(text)
    (place,) = cache.glob("plans/*/rows/best_fit-32")
    if damage == "missing":
        (place / "train.first").unlink()
    else:
        content = bytearray((place / damage).read_bytes())
        content[5] ^= 1
        (place / damage).write_bytes(content)
    assert started(text) == first and len(made) == 4
    assert started(text) == first and len(made) == 4


def test_what_a_kill_left_is_no_plan(cache, text, made, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    corpus.build(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            started(text)
    (rows,) = cache.glob("plans/*/rows")
    (rows / ".best_fit-32").mkdir()
    (rows / ".best_fit-32/train.first").write_bytes(b"half")
    first = started(text)
    assert len(made) == 4 and [file.name for file in rows.iterdir()] == ["best_fit-32"]
    assert started(text) == first and len(made) == 4


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(cache, text, made, capsys):
    corpus.build(text)
    (cache / "plans").write_text("no folder")
    first = started(text)
    assert len(made) == 2 and first[0]
    said = capsys.readouterr().err
    assert said.count("the plan of rows cannot be kept, and is made at each start") == 1


def test_a_full_disk_while_it_is_kept_stops_nothing(cache, text, made, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plans.packing, "save", full)
    assert started(text)[0] and len(made) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_large_one_is_compared_beside_the_training_and_then_made_again(
    cache, text, made, monkeypatch
):
    monkeypatch.setattr(shards, "_DIGESTED", 0)
    first = started(text)
    (place,) = cache.glob("plans/*/rows/best_fit-32")
    file = place / "train.lengths"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    built = corpus.build(text)
    built.train.plan(*PLAN)
    assert file in built.unchecked and len(made) == 2
    with pytest.raises(shards.Damaged, match=r"train\.lengths of the cache is damaged"):
        shards.Check(built.unchecked, made_again=corpus.made_again()).finish(lambda: False)
    assert started(text) == first and len(made) == 4
