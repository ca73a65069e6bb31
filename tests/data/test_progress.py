"""The bar of a preparation is where reading is in its files, whatever is kept of them."""

import contextlib
import gzip
import json
import os

import numpy as np
import pytest

from lm.data import corpus, prepare, progress
from lm.data.settings import Config

WORDS = np.random.default_rng(0).choice([f"word{i}" for i in range(5000)], (400, 40)).tolist()
ROWS = [" ".join(row) for row in WORDS]


class Bar(list):
    """Stands for a tqdm: where each of its updates led to."""

    made: list = []  # noqa: RUF012

    def __init__(self, total, **_):
        super().__init__()
        self.total, self.n = total, 0
        self.made.append(self)

    def update(self, size):
        assert size >= 0
        self.n += size
        self.append(self.n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(prepare, "CHUNK", 4000)
    monkeypatch.setattr(prepare, "SHARD", 20_000)
    return Bar.made


def jsonl(file):
    lines = [json.dumps({"other": text[::-1], "text": text}) for text in ROWS]
    file.write_bytes("".join(line + "\n" for line in lines).encode())


def packed(file):
    jsonl(file)
    file.write_bytes(gzip.compress(file.read_bytes()))


def parquet(file):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"text": ROWS}), file, row_group_size=20, compression="zstd")


def several(file):
    for number, text in enumerate(ROWS):
        file.with_name(f"{number:03}.txt").write_text(text)
    return str(file.with_name("*.txt"))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.jsonl", jsonl), ("a.jsonl.gz", packed), ("a.parquet", parquet), ("a.txt", several)],
)
@pytest.mark.parametrize("clean", [(), ("gopher_quality min_words=99",)])
def test_it_ends_at_the_size_of_the_files_and_is_never_beyond(tmp_path, bars, name, write, clean):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / name) or str(tmp_path / "in" / name)
    with pytest.raises(ValueError, match="split is empty") if clean else contextlib.nullcontext():
        corpus.prepare_in(tmp_path / "out", Config(path=(path,), tokenizer="char", clean=clean))
    total = sum(file.stat().st_size for file in (tmp_path / "in").iterdir())
    assert len(bars) == 2  # the first for the tokenizer
    for bar in bars:
        assert bar.total == bar.n == total == max(bar)
        assert len(bar) > 20
        if not name.endswith(".gz"):  # which is read 64 KB at a time
            due = np.linspace(0, total, len(bar) + 1)[1:]
            np.testing.assert_allclose(bar, due, atol=0.2 * total)


def test_of_two_sources_both_count_and_after_a_kill_it_begins_where_reading_does(
    tmp_path, bars, monkeypatch
):
    for name in "ab":
        jsonl(tmp_path / f"{name}.jsonl")
    size = os.path.getsize(tmp_path / "a.jsonl")
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    mixed = Config(mixture=tuple((path, 1.0) for path in paths), tokenizer="char")
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    corpus.prepare_in(tmp_path / "mix", mixed)
    assert [(bar.total, bar.n) for bar in bars] == [
        (2 * size, 2 * size),
        (size, size),
        (size, size),
    ]

    end_shard, calls = prepare.Writer.end_shard, []

    def cut(self):
        end_shard(self)
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    cfg = Config(path=(paths[0],), tokenizer="byte")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.Writer, "end_shard", cut)
        corpus.prepare_in(tmp_path / "out", cfg)
    stopped = bars[-1].n
    corpus.prepare_in(tmp_path / "out", cfg)
    assert 0 < stopped < bars[-1][0] < bars[-1].n == size


def test_of_text_that_is_no_file_what_was_read_is_counted(tmp_path, bars):
    fsspec = pytest.importorskip("fsspec")
    jsonl(tmp_path / "a.jsonl")
    fsspec.filesystem("memory").pipe("/bar/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    cfg = Config(path=("memory://bar/a.jsonl",), tokenizer="byte")
    corpus.prepare_in(tmp_path / "out", cfg)
    assert bars[-1].total is None and bars[-1].n == sum(map(len, ROWS))
