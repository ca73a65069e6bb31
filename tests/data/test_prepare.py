"""What is prepared depends on the documents alone: on no count of workers, no kill, no second process."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm import manifests
from lm.config import ConfigError
from lm.data import corpus, packing, prepare, shards
from lm.data.settings import Config

RUN = """
import sys
from pathlib import Path
from lm.data import corpus, prepare, tokenizers
from lm.data.settings import Config
prepare.CHUNK, prepare.SHARD = 2000, 12_000
if __name__ == "__main__":
    source, folder, workers, delay = sys.argv[1:]
    add = prepare.Writer.add
    def slow(self, encoded):
        import time
        time.sleep(float(delay))
        add(self, encoded)
    prepare.Writer.add = slow
    cfg = Config(path=(source,), vocab_size=320)
    corpus.prepare_in(Path(folder), cfg, workers=int(workers))
"""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2000)
    monkeypatch.setattr(prepare, "SHARD", 12_000)


@pytest.fixture
def text(tmp_path):
    """JSON lines with empty ones among them."""
    lines = [f"document {i} of many, " * (1 + i % 13) for i in range(400)]
    lines[7] = lines[80] = ""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return Config(path=(str(file),), vocab_size=320)


def files(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def start(tmp_path, cfg, folder, workers, delay=0.0):
    (tmp_path / "prepare_it.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "prepare_it.py"), cfg.path[0], str(folder)]
    return subprocess.Popen(
        [*command, str(workers), str(delay)],
        env=os.environ | {"PYTHONPATH": str(Path(corpus.__file__).parents[2])},
        start_new_session=True,
    )


def wait_for_lines(folder, number, process):
    journal = folder / "journal.jsonl"
    for _ in range(3000):
        assert process.poll() is None, "it ended before it could be killed"
        if journal.exists() and len(journal.read_text().splitlines()) > number:
            return
        time.sleep(0.02)
    raise AssertionError("no shard in a minute")


def cut_short(monkeypatch, folder, cfg):
    """Prepare up to the third shard."""
    end_shard, calls = prepare.Writer.end_shard, []

    def cut(self):
        end_shard(self)
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Writer, "end_shard", cut)
        corpus.prepare_in(folder, cfg)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_anywhere_the_next_start_gives_the_same_bytes(tmp_path, text, small, workers):
    corpus.prepare_in(tmp_path / "whole", text)
    whole = files(tmp_path / "whole")
    shard_files = [name for name in whole if name.startswith("train-")]
    assert len(shard_files) > 4 and "journal.jsonl" not in whole
    for shard in (1, 3):
        process = start(tmp_path, text, tmp_path / "killed", workers, delay=0.2)
        wait_for_lines(tmp_path / "killed", shard, process)
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: workers must follow
        process.wait()
        for _ in range(200):
            if not subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("workers outlive their parent")
        assert not (tmp_path / "killed" / "manifest.json").exists()
    # Half a line in the journal and half a file, as a power failure leaves them.
    with (tmp_path / "killed" / "journal.jsonl").open("a") as journal:
        journal.write('{"shard": 9, "fi')
    (tmp_path / "killed" / "train-00099.tokens").write_bytes(b"half")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "killed").glob("train-0000[012].tokens")}
    corpus.prepare_in(tmp_path / "killed", text)
    assert files(tmp_path / "killed") == whole
    assert {f: f.stat().st_mtime_ns for f in before} == before, "finished shards are kept"


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, text, small):
    corpus.prepare_in(tmp_path / "none", text)
    process = start(tmp_path, text, tmp_path / "three", 3)
    assert process.wait() == 0
    assert files(tmp_path / "three") == files(tmp_path / "none")


def test_a_shard_damaged_before_the_end_is_made_again(tmp_path, text, small):
    corpus.prepare_in(tmp_path / "whole", text)
    process = start(tmp_path, text, tmp_path / "killed", 0, delay=0.2)
    wait_for_lines(tmp_path / "killed", 3, process)
    process.kill()
    process.wait()
    shard = tmp_path / "killed" / "train-00001.tokens"
    content = shard.read_bytes()
    shard.write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:])
    corpus.prepare_in(tmp_path / "killed", text)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_shards_are_one_stream_and_documents_know_their_origin(tmp_path, text, small, monkeypatch):
    corpus.prepare_in(tmp_path / "many", text)
    many = corpus.load(tmp_path / "many")
    assert isinstance(many.train.tokens, shards.Tokens)
    monkeypatch.setattr(prepare, "SHARD", 1 << 30)
    corpus.prepare_in(tmp_path / "one", text)
    one = corpus.load(tmp_path / "one")
    assert many.fingerprint == one.fingerprint and many.report == one.report
    whole = np.asarray(one.train.tokens)
    np.testing.assert_array_equal(np.asarray(many.train.tokens), whole)
    rng = np.random.default_rng(0)
    for begin, end in rng.integers(-len(whole), len(whole) + 9, (300, 2)):
        np.testing.assert_array_equal(many.train.tokens[begin:end], whole[begin:end])
        if -len(whole) <= begin < len(whole):
            assert many.train.tokens[begin] == whole[begin]
    lines = [json.loads(line)["text"] for line in Path(text.path[0]).read_text().splitlines()]
    ends = [*many.train.starts[1:], many.train.num_inputs]
    assert len(many.train.starts) > 300
    for begin, end, origin in zip(many.train.starts, ends, many.train.origins, strict=True):
        assert many.tokenizer.decode(many.train.tokens[begin + 1 : end]) == lines[origin["record"]]


@pytest.mark.parametrize("name", ["train-00002.tokens", "validation.starts", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_file_is_refused_by_name(tmp_path, text, small, name, damage):
    folder = tmp_path / "prepared"
    corpus.prepare_in(folder, text)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "cut":
        (folder / name).write_bytes(content[:-2])
    if damage == "changed":
        (folder / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    if (name, damage) == ("manifest.json", "gone"):
        with pytest.raises(ConfigError, match="its preparation is not finished"):
            corpus.build(Config(path=(str(folder),)))
        return
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*; restore it, or prepare"):
        corpus.build(Config(path=(str(folder),)))


def test_a_prepared_corpus_is_trained_on_as_it_is(tmp_path, text, small, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    corpus.prepare_in(tmp_path / "prepared", text)
    direct = corpus.build(text)
    built = corpus.build(Config(path=(str(tmp_path / "prepared"),)))
    assert built.fingerprint == direct.fingerprint
    assert built.tokenizer.fingerprint == direct.tokenizer.fingerprint
    assert corpus.build(text, tokenizer=built.tokenizer).fingerprint == direct.fingerprint
    other = corpus.build(dataclasses.replace(text, tokenizer="byte")).tokenizer
    with pytest.raises(ConfigError, match="prepared with another tokenizer"):
        corpus.build(Config(path=(str(tmp_path / "prepared"),)), tokenizer=other)


def test_a_config_that_names_a_field_trains_on_what_was_prepared_with_it(tmp_path, small):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"body": "text {n}"}}\n' for n in range(300)))
    cfg = Config(path=(str(path),), field="body", tokenizer="byte")
    corpus.prepare_in(tmp_path / "prepared", cfg)
    there = (str(tmp_path / "prepared"),)
    assert corpus.build(dataclasses.replace(cfg, path=there)).train.num_bytes > 200
    with pytest.raises(ConfigError, match=r"data\.field=title: .* was prepared with 'body'"):
        corpus.build(dataclasses.replace(cfg, path=there, field="title"))


def test_settings_that_a_prepared_corpus_overrules_are_said(tmp_path, text, small, capsys):
    corpus.prepare_in(tmp_path / "prepared", text)
    cfg = dataclasses.replace(text, path=(str(tmp_path / "prepared"),), batch_size=7)
    corpus.build(cfg)
    assert "notice" not in capsys.readouterr().out
    corpus.build(dataclasses.replace(cfg, mixture_temperature=2.0))  # of how it is read
    assert "notice" not in capsys.readouterr().out
    corpus.build(dataclasses.replace(cfg, vocab_size=400))
    assert "data.vocab_size=400: " in capsys.readouterr().out
    for other in ({"clean": ("unicode",)}, {"fold": "0/5"}, {"validation_fraction": 0.2}):
        with pytest.raises(ConfigError, match=r"was prepared with .*; set it to that, or prepare"):
            corpus.build(dataclasses.replace(cfg, **other))


def test_a_folder_of_something_else_is_left_alone(tmp_path, text, small):
    folder = tmp_path / "prepared"
    corpus.prepare_in(folder, text)
    before = files(folder)
    for other in (
        dataclasses.replace(text, tokenizer="byte"),
        dataclasses.replace(text, fold="0/3"),
    ):
        with pytest.raises(
            ConfigError, match="a corpus was prepared here, of other text or settings"
        ):
            corpus.prepare_in(folder, other)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="it holds other files, and no corpus"):
        corpus.prepare_in(folder, text)
    (folder / "journal.jsonl").write_text('{"key": "another", "shard": 1}\n{"shard": 1}\n')
    with pytest.raises(ConfigError, match="a corpus was begun here, of other text"):
        corpus.prepare_in(folder, text)
    (folder / "journal.jsonl").unlink()
    before.pop("manifest.json")
    assert files(folder) == before


def test_lists_that_were_damaged_before_the_end_are_made_again(tmp_path, text, small, monkeypatch):
    corpus.prepare_in(tmp_path / "whole", text)
    for name, damage in (("train.starts", b""), ("validation.origins", b"\1" * 200)):
        folder = tmp_path / name
        cut_short(monkeypatch, folder, text)
        content = (folder / name).read_bytes()
        assert len(content) > 100
        (folder / name).write_bytes(damage + content[len(damage) :] if damage else b"")
        corpus.prepare_in(folder, text)
        assert files(folder) == files(tmp_path / "whole")


def test_a_damaged_plan_is_refused_and_a_whole_one_left_alone(tmp_path, text, small):
    folder = tmp_path / "prepared"
    corpus.prepare_in(folder, text)
    built = corpus.load(folder)
    plans = {split.name: split.plan("best_fit", 32) for split in (built.train, built.validation)}
    windows = {split: [plan] for split, plan in plans.items()}
    keep = functools.partial(packing.save, folder, "best_fit", 32, windows)
    keep(fingerprint=built.fingerprint)
    file = folder / "rows/best_fit-32/train.begins"
    before = file.stat().st_ino
    (folder / "rows/.left").mkdir()
    keep(fingerprint=built.fingerprint)
    assert file.stat().st_ino == before and not (folder / "rows/.left").exists()
    loaded = corpus.load(folder).train.plans["best_fit", 32]
    np.testing.assert_array_equal(loaded.begins, plans["train"].begins)
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train\.begins is damaged \(its SHA-256"):
        corpus.load(folder)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, text, small, monkeypatch):
    add = prepare.Writer.add

    def changing(self, encoded):
        add(self, encoded)
        os.utime(text.path[0], (1, 1))

    monkeypatch.setattr(prepare.Writer, "add", changing)
    with pytest.raises(ConfigError, match=r"a\.jsonl changed while it was read"):
        corpus.prepare_in(tmp_path / "prepared", text)
    assert not (tmp_path / "prepared/manifest.json").exists()


def test_a_start_that_made_no_shard_does_not_bind_its_folder(tmp_path, text, small):
    folder = tmp_path / "prepared"
    mistaken = dataclasses.replace(text, tokenizer="byte", fold="0/2")
    good = Path(text.path[0]).read_text()
    Path(text.path[0]).write_text('{"text": "a"}\n{"no": 1}\n' + good)
    with pytest.raises(ConfigError, match="has no text by that name"):
        corpus.prepare_in(folder, mistaken)
    with pytest.raises(ConfigError, match="its preparation is not finished"):
        corpus.build(Config(path=(str(folder),)))
    (folder / ".journal.jsonl").write_text("half")  # a kill between two lines of code
    Path(text.path[0]).write_text(good)
    corpus.prepare_in(folder, text)
    corpus.prepare_in(tmp_path / "other", text)
    assert files(folder) == files(tmp_path / "other")
    with pytest.raises(ConfigError, match="it is a prepared corpus"):
        corpus.prepare_in(tmp_path / "third", Config(path=(str(folder),)))


def test_a_tokenizer_half_replaced_is_not_taken_for_the_old_one(tmp_path, text, small, monkeypatch):
    """A start that made no shard has left its tokenizer; the next one, of other settings, dies over it."""
    folder, other = tmp_path / "prepared", dataclasses.replace(text, vocab_size=330)

    def no_shard(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "Encoder", no_shard)
        with pytest.raises(KeyboardInterrupt):
            corpus.prepare_in(folder, text)
        patched.setattr(manifests, "sync", no_shard)
        with pytest.raises(KeyboardInterrupt):
            corpus.prepare_in(folder, other)
    corpus.prepare_in(folder, text)
    corpus.prepare_in(tmp_path / "other", text)
    assert files(folder) == files(tmp_path / "other")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ConfigError, match="the train split is empty"):
        corpus.prepare_in(
            tmp_path / "made", Config(path=(str(tmp_path / "a.jsonl"),), tokenizer="byte")
        )


def test_a_mistake_in_a_document_ends_workers_too(tmp_path, text, small):
    with Path(text.path[0]).open("a") as file:
        file.write('{"text": "\u00e9"}\n{"no": 1}\n')
    for workers in (0, 2):
        process = start(tmp_path, text, tmp_path / f"{workers}", workers)
        assert process.wait(120) == 1
        assert not (tmp_path / f"{workers}" / "manifest.json").exists()


def repeated(tmp_path):
    """Documents of which some are dropped by a step and some are repeats of earlier ones."""
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(300)]
    lines = [" ".join(rng.choice(words, 40)) for _ in range(300)]
    lines[10::10] = lines[:29]
    lines[5::50] = ["short"] * len(lines[5::50])
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{line} \n"}) + "\n" for line in lines))
    kept = list(dict.fromkeys(line for line in lines if line != "short"))
    steps = ("whitespace", "gopher_quality min_words=20 min_stop_words=0", "exact_duplicates")
    return Config(path=(str(file),), tokenizer="byte", clean=steps), kept


def documents(built):
    found = {}
    for split in (built.train, built.validation):
        for number, origin in enumerate(split.origins):
            begin, length = split.span(number)
            text = built.tokenizer.decode(split.tokens[begin : begin + length])
            found[int(origin["record"])] = text
    return [found[record] for record in sorted(found)]


def test_what_cleaning_drops_is_not_there_and_is_counted(tmp_path, small):
    cfg, kept = repeated(tmp_path)
    corpus.prepare_in(tmp_path / "clean", cfg)
    built = corpus.load(tmp_path / "clean")
    assert [text.strip() for text in documents(built)] == kept
    report = built.report["clean"]
    assert report["whitespace"]["documents"] == 300 == report["whitespace"]["changed"]
    assert report["gopher_quality"]["dropped"] == 6
    assert report["exact_duplicates"]["dropped"] == 294 - len(kept) > 20
    assert f"{300 - len(kept)} dropped by cleaning" in built.summary()
    assert (
        corpus.load(tmp_path / "clean").fingerprint
        != corpus.build(dataclasses.replace(cfg, clean=())).fingerprint
    )


def test_a_start_after_a_kill_knows_the_documents_before(tmp_path, small, monkeypatch):
    cfg, _ = repeated(tmp_path)
    monkeypatch.setattr(prepare, "SHARD", 6000)
    corpus.prepare_in(tmp_path / "whole", cfg)
    cut_short(monkeypatch, tmp_path / "killed", cfg)
    corpus.prepare_in(tmp_path / "killed", cfg)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    corpus.prepare_in(tmp_path / "workers", cfg, workers=2)
    assert files(tmp_path / "workers") == files(tmp_path / "whole")


def test_of_a_pair_the_source_is_cleaned(tmp_path):
    words = " ".join(f"word{i}" for i in range(30))
    lines = [f"{words} {i}  \tyes " for i in range(120)] + ["short\tno"] * 3
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    cfg = Config(
        path=(str(tmp_path / "a.tsv"),),
        source_field="0",
        label_field="1",
        tokenizer="byte",
        clean=("whitespace", "gopher_quality min_words=20 min_stop_words=0"),
    )
    corpus.prepare_in(tmp_path / "made", cfg)
    built = corpus.load(tmp_path / "made")
    assert built.labels == ("yes ",)
    assert built.train.num_pairs + built.validation.num_pairs == 120
    assert built.tokenizer.decode(built.train.pair(0)[0]).endswith(tuple("0123456789"))


def test_a_label_of_dropped_repeats_alone_is_no_class(tmp_path):
    rows = [{"body": f"a text of its own, number {i}", "label": "a"} for i in range(20)]
    rows.append({"body": rows[0]["body"], "label": "never kept"})
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"source_field": "body", "label_field": "label", "tokenizer": "byte"}
    made = Config(path=(str(file),), clean=("exact_duplicates",), **fields)
    corpus.prepare_in(tmp_path / "prepared", made)
    assert corpus.build(Config(path=(str(tmp_path / "prepared"),))).labels == ("a",)


def test_a_step_that_there_is_not_is_named(tmp_path):
    cfg, _ = repeated(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.clean='unicod': .*did you mean unicode"):
        corpus.build(dataclasses.replace(cfg, clean=("unicod",)))


def test_a_place_without_locks_is_prepared_all_the_same(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    with prepare.locked(tmp_path):
        assert (tmp_path / prepare.LOCK).exists()
