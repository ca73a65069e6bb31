"""Files of any file system give what they hold, a mark that changes with it, and errors of one line."""

import bz2
import gzip
import http.server
import io
import json
import lzma
import random
import threading
import time
import tracemalloc
import zipfile
import zlib

import pytest
import zstandard

from lm.config import ConfigError
from lm.data import compressed, corpus, files, sources
from lm.data.settings import Config

ROWS = [f"text {i} ü" for i in range(300)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
# Of one stream, cut off or not: what can be had.
UNPACK = {
    ".gz": lambda data: zlib.decompressobj(31).decompress(data),
    ".zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    ".bz2": lambda data: bz2.BZ2Decompressor().decompress(data),
    ".xz": lambda data: lzma.LZMADecompressor().decompress(data),
    ".lzma": lambda data: lzma.LZMADecompressor().decompress(data),
}
CONTENT = {
    "txt": "\n".join(ROWS),
    "jsonl": "\n".join(json.dumps({"text": row}) for row in ROWS),
    "csv": "\n".join(["n,text", *(f'{i},"{row}"' for i, row in enumerate(ROWS))]),
    "tsv": "\n".join(["n\ttext", *(f"{i}\t{row}" for i, row in enumerate(ROWS))]),
}


def opened(*path, **options):
    settings = {"fields": sources.Fields(), "on_invalid": "replace", **options}
    return sources.open_source("python_docs", path=list(map(str, path)), **settings)


def texts(source):
    return [document.text for document in source]


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("packing", PACK)
def test_a_remote_file_reads_like_a_local_one(tmp_path, memory, kind, packing):
    name = f"a.{kind}{packing}"
    data = PACK[packing](CONTENT[kind].encode())
    (tmp_path / name).write_bytes(data)
    memory.pipe(f"/folder/{name}", data)
    expected = texts(opened(tmp_path / name))
    assert len(expected) == (1 if kind == "txt" else 300)
    assert texts(opened(f"memory://folder/{name}")) == expected
    assert opened(f"file://{tmp_path}/{name}") == opened(tmp_path / name)
    assert (
        list(opened(f"memory://folder/{name}").read(0, 250)) == list(opened(tmp_path / name))[250:]
    )


def test_a_glob_of_a_url_is_in_order_of_name(memory):
    for name in ("b", "a", "deep/c"):
        memory.pipe(f"/folder/{name}.txt", name.encode())
    source = opened("memory://folder/*.txt")
    assert source.parts == ("memory:///folder/a.txt", "memory:///folder/b.txt")
    assert texts(source) == ["a", "b"]
    assert texts(opened("memory://folder/**/*.txt")) == ["a", "b", "deep/c"]


def test_a_file_over_http(tmp_path, server):
    rows = [row * 3000 for row in ROWS]  # more than is read ahead
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    source = opened(f"{server}/a.jsonl?signature=secret")
    assert texts(source) == rows
    assert source.parts == (f"{server}/a.jsonl",) and "secret" not in repr(source)
    assert source.fingerprint() == source.fingerprint()
    with pytest.raises(ConfigError, match=r"none\.txt: no such file"):
        opened(f"{server}/none.txt?signature=secret")


def test_files_inside_an_archive(tmp_path, memory):
    with zipfile.ZipFile(memory.open("/a.zip", "wb"), "w") as archive:
        archive.writestr("one.txt", "first")
        archive.writestr("two.jsonl", CONTENT["jsonl"])
    assert texts(opened("zip://*.txt::memory://a.zip")) == ["first"]
    assert texts(opened("zip://two.jsonl::memory://a.zip")) == ROWS


def test_the_mark_of_a_remote_file_changes_with_it(memory, monkeypatch):
    def mark(content):
        memory.pipe("/a.txt", content)
        return files.mark("memory://a.txt")

    assert mark(b"one") != mark(b"more")
    first = files.mark("memory://a.txt")
    assert files.mark("memory://a.txt") == first
    time.sleep(0.01)
    assert mark(b"two ") != first  # of the same size
    with monkeypatch.context() as patch:
        patch.setattr(files, "_raw", None)  # it is not read
        assert files.mark("memory://a.txt")
    # A file system that knows no time and no checksum is read.
    monkeypatch.setattr(files, "_TIMES", ())
    assert mark(b"one") == mark(b"one") != mark(b"two")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://none.txt", r"none\.txt: no such file"),
        ("memory://*.none", r"no such file"),
        ("memory://folder", r"a folder; name its files"),
        ("nowhere://a.txt", r"nowhere://a\.txt: ValueError .*Protocol not known"),
        ("https://me:secret@host/a.txt", r"a password in it .*leave it out"),
        ("mongodb://me:se/cr@et@host/a.b", r"a password in it .*LM_MONGODB_PASSWORD"),
    ],
)
def test_a_url_that_cannot_be_read_is_an_error_of_one_line(memory, path, message):
    memory.pipe("/folder/a.txt", b"text")
    with pytest.raises(ConfigError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_network_that_fails_is_no_damaged_file(memory, monkeypatch):
    memory.pipe("/a.jsonl", CONTENT["jsonl"].encode())
    source = opened("memory://a.jsonl", on_broken="skip")

    def fails(*args):
        raise TimeoutError("too slow")

    monkeypatch.setattr(type(memory.open("/a.jsonl")), "read", fails, raising=False)
    with pytest.raises(
        ConfigError, match=r"cannot read memory:///?a\.jsonl \(TimeoutError: too slow"
    ):
        texts(source)


BROKEN = {
    "a.jsonl": (
        b'{"text": "one"}\n{"te\n{"body": 1}\n{"text": "two"}\n',
        ["no JSON", "no such text"],
    ),
    "a.tsv": (b"n\ttext\n1\tone\n2\n\n3\n4\ttwo\n", ["ragged row", "ragged row"]),
    "a.csv": (b'n,text\n1,one\n2,"x"y\n3\n4,two\n', ["bad quotes", "ragged row"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_skipped_where_they_stand(tmp_path, name):
    content, kinds = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    documents = list(opened(tmp_path / name, on_broken="skip"))
    assert [(d.text, d.broken) for d in documents] == [
        ("one", ""), ("", kinds[0]), ("", kinds[1]), ("two", ""),
    ]  # fmt: skip
    for start in range(5):
        assert list(opened(tmp_path / name, on_broken="skip").read(0, start)) == documents[start:]
    with pytest.raises(ConfigError, match=rf"{name}.*data\.on_broken=skip"):
        list(opened(tmp_path / name))


LONG = {
    "a.jsonl": b'{"text": "one"}\n{"text": "' + b"long" * 400_000 + b'"}\n{"text": "two"}\n',
    "a.tsv": b"text\tn\none\t1\n" + b"long" * 400_000 + b"\t2\ntwo\t3\n",
    "a.csv": b"text,n\none,1\n" + b"long" * 400_000 + b",2\ntwo,3\n",
    "a.txt": b"long" * 400_000,
}


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("name", LONG)
def test_what_is_longer_than_memory_bears_is_refused_or_skipped(tmp_path, name, packing):
    """Of a table with quotes the rest is skipped too, as it is not known where the row ends."""
    file = tmp_path / f"{name}{packing}"
    file.write_bytes(PACK[packing](LONG[name]))
    assert max(map(len, texts(opened(file, max_bytes=1_700_000)))) == 1_600_000
    skipped = [(d.text, d.broken) for d in opened(file, on_broken="skip", max_bytes=1_000_000)]
    expected = {
        "a.jsonl": [("one", ""), ("", "too long"), ("two", "")],
        "a.tsv": [("one", ""), ("", "too long"), ("two", "")],
        "a.txt": [("", "too long")],
    }
    for start in range(4):
        again = list(opened(file, on_broken="skip", max_bytes=1_000_000).read(0, start))
        assert [(d.text, d.broken) for d in again] == skipped[start:]
    assert skipped == expected.get(name, [("one", ""), ("", "damaged file")])
    where = {"a.jsonl": ":2", "a.txt": ""}.get(name, ":3")
    with pytest.raises(ConfigError, match=rf"{name}{packing}{where} is longer than data\.max_doc"):
        list(opened(file, max_bytes=1_000_000))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_as_long_as_is_allowed_is_read_and_the_next_one_too(tmp_path, end):
    lines = [json.dumps({"text": name * (200 + i)}) for i, name in enumerate("abcd")]
    (tmp_path / "a.jsonl").write_bytes("".join(line + end for line in lines).encode())
    sizes = [len(line) for line in lines]
    for most in range(min(sizes) - 2, max(sizes) + 3):
        found = list(opened(tmp_path / "a.jsonl", on_broken="skip", max_bytes=most))
        assert [d.broken for d in found] == [("too long" if n > most else "") for n in sizes]
        assert all(d.text == "" or d.text == "abcd"[i] * (200 + i) for i, d in enumerate(found))


def test_a_quote_that_is_not_closed_takes_no_more_than_a_document_may_have(tmp_path):
    (tmp_path / "a.csv").write_text('text\none\n"two\n' + "a line\n" * 500)
    with pytest.raises(ConfigError, match=r"a\.csv:\d+ is longer than data\.max_document_bytes"):
        list(opened(tmp_path / "a.csv", max_bytes=100))
    (tmp_path / "a.csv").write_text("text\n" + "\n" * 200 + "one\n" * 50)
    assert texts(opened(tmp_path / "a.csv", max_bytes=100)) == ["one"] * 50


@pytest.mark.parametrize(
    ("packing", "size", "most"),
    [
        (".zst", 1 << 27, 100e6),
        (".gz", 1 << 25, 9e6),
        (".bz2", 1 << 25, 9e6),
        (".xz", 1 << 25, 20e6),
    ],
)
def test_what_a_few_bytes_are_compressed_of_takes_little_memory(tmp_path, packing, size, most):
    file = tmp_path / f"a.jsonl{packing}"
    file.write_bytes(PACK[packing](bytes(size)) * 2)
    tracemalloc.start()
    (document,) = opened(file, on_broken="skip", max_bytes=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert document.broken == "too long" and file.stat().st_size < size / 900 * 2 and peak < most


def test_no_file_is_read_twice(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for path in (["[ab].txt", "a.txt"], ["a.txt", "link.txt"]):
        with pytest.raises(ConfigError, match=r"\.txt is named twice; name it once"):
            opened(*(tmp_path / name for name in path))


def test_what_is_skipped_is_counted_by_its_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_bytes(BROKEN["a.jsonl"][0] + b"{\n")
    built = corpus.build(
        Config(
            path=(str(tmp_path / "a.jsonl"),),
            tokenizer="byte",
            on_broken="skip",
            validation_fraction=0.5,
        )
    )
    assert built.report["broken"] == {"no JSON": 2, "no such text": 1}
    assert built.report["documents"] == 2
    assert "3 broken records skipped" in built.summary()


@pytest.mark.parametrize("packing", UNPACK)
@pytest.mark.parametrize("kind", CONTENT)
def test_of_a_damaged_file_what_is_whole_is_read(tmp_path, kind, packing):
    content, file = CONTENT[kind].encode(), tmp_path / f"a.{kind}{packing}"
    whole = PACK[packing](content)
    file.write_bytes(whole)
    expected = texts(opened(file))
    for data in (whole + b"no member", whole[: len(whole) * 2 // 3]):
        file.write_bytes(data)
        lines = UNPACK[packing](data).count(b"\n")  # a last line without an end may go on
        names = kind in ("csv", "tsv")
        kept = 0 if kind == "txt" else max(0, lines - names)
        assert len(data) < len(whole) or lines >= 299
        documents = list(opened(file, on_broken="skip"))
        assert [document.text for document in documents[:-1]] == expected[:kept]
        assert documents[-1] == ("", 0, None, "damaged file")
        for start in (kept, kept + 1):
            assert list(opened(file, on_broken="skip").read(0, start)) == documents[start:]
        with pytest.raises(ConfigError, match=r"is damaged .*at byte .*data\.on_broken=skip"):
            list(opened(file))


@pytest.mark.parametrize("place", ["its magic", "its middle"])
@pytest.mark.parametrize("packing", [".gz", ".zst", ".bz2", ".xz"])
def test_after_a_damaged_stream_the_next_ones_are_read(tmp_path, packing, place):
    lines = [json.dumps({"text": row}) + "\n" for row in ROWS]
    lines[250] = "no JSON\n"
    parts = [PACK[packing]("".join(lines[i : i + 100]).encode()) for i in (0, 100, 200)]
    whole, begin = b"".join(parts), len(parts[0])
    file = tmp_path / f"a.jsonl{packing}"
    file.write_bytes(whole)
    before = list(opened(file, on_broken="skip"))
    assert [document.text for document in before] == [*ROWS[:250], "", *ROWS[251:]]
    assert before[250].broken == "no JSON"
    damaged = bytearray(whole)
    damaged[begin + (len(parts[1]) // 2 if place == "its middle" else 0)] ^= 255
    file.write_bytes(damaged)
    documents = list(opened(file, on_broken="skip"))
    assert documents[:100] == before[:100] and documents[-100:] == before[200:]
    of_it = documents[100:-100]
    assert [document.broken == "damaged file" for document in of_it] == [False] * (
        len(of_it) - 1
    ) + [True]
    assert len(of_it) == 1 or (packing, place) == (".gz", "its middle")
    for start in (99, 101, len(documents) - 3):
        assert list(opened(file, on_broken="skip").read(0, start)) == documents[start:]
    where = rf"a\.jsonl{packing} is damaged .*the stream that begins at byte {begin:,}\)"
    if place == "its middle":  # nonsense may come of it before it is known
        where += rf"|a\.jsonl{packing}:1\d\d: not JSON"
    with pytest.raises(ConfigError, match=where):
        list(opened(file))


@pytest.mark.parametrize("packing", [".gz", ".zst", ".xz"])
def test_of_a_stream_whose_checksum_is_wrong_the_lines_read_before_stay(tmp_path, packing):
    """It is known at its end: holding them back would take the memory of a whole stream."""
    words = random.Random(0)
    rows = [words.randbytes(20).hex() for i in range(5000)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    damaged = bytearray(PACK[packing](lines))
    damaged[{".gz": -8, ".zst": -1, ".xz": -40}[packing]] ^= 1  # of the checksum, or near it
    file = tmp_path / f"a.jsonl{packing}"
    file.write_bytes(damaged + PACK[packing](b'{"text": "two"}\n'))
    *found, last, two = [(d.text, d.broken) for d in opened(file, on_broken="skip")]
    assert (last, two) == (("", "damaged file"), ("two", ""))
    assert found == [(row, "") for row in rows[: len(found)]]
    assert 2000 < len(found) < 5000, "but for those of the last piece that was read"
    with pytest.raises(ConfigError, match=r"\(lines read before it was known stay\)"):
        list(opened(file))


def test_what_looks_like_a_stream_in_the_damage_is_passed_over(tmp_path):
    first, last = (gzip.compress(f'{{"text": "{name}"}}\n'.encode()) for name in ("one", "two"))
    begin, file = b"\x1f\x8b\x08", tmp_path / "a.jsonl.gz"
    for fill in (begin * 30_000, b"x" * 65_535 + begin[:2], b"x" * 70_000, b"\0" * 70_000 + b"x"):
        file.write_bytes(first + fill + last)
        documents = [(d.text, d.broken) for d in opened(file, on_broken="skip")]
        assert documents == [("one", ""), ("", "damaged file"), ("two", "")]
    file.write_bytes(first + b"\0" * 70_000 + last)  # which fill up a block of a tape
    assert texts(opened(file)) == ["one", "two"]


@pytest.mark.parametrize("suffix", ["zip", "7z", "br", "lz4", "tar", "tar.gz", "tgz", "Z"])
def test_what_is_packed_in_another_way_is_refused_by_its_suffix(tmp_path, suffix):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"any bytes")
    for source in ("python_docs", "jsonl", "text"):
        with pytest.raises(ConfigError, match=r"a\.jsonl\.\w+.*: \.\w+ is not read, but \.gz, "):
            sources.open_source(
                source,
                path=[str(tmp_path / f"a.jsonl.{suffix}")],
                fields=sources.Fields(),
                on_invalid="replace",
            )


@pytest.mark.parametrize("content", [b"", b"\0\1\2"])
def test_a_text_that_is_none_is_skipped(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"text")
    first, second = opened(tmp_path / "*.txt", on_broken="skip")
    assert first.broken in ("empty file", "no text") and not first.text
    assert second.text == "text"


@pytest.mark.parametrize(
    ("path", "kind", "packing"),
    [
        ("simplecache::s3://bucket/a.jsonl", "jsonl", ""),
        ("filecache::https://host/a.jsonl.gz?sign=a::b", "jsonl", ".gz"),
        ("zip://a.tsv::s3://bucket/a.zip", "tsv", ""),
        ("s3://bucket/a.parquet", "parquet", ""),
    ],
)
def test_a_chain_of_urls_is_of_the_kind_of_its_first_url(path, kind, packing):
    assert sources.kind(path) == kind and files.packing(path) == packing


def test_a_url_of_github_has_no_password():
    sources.refuse_passwords("path", ["github://org:repo@main/a.jsonl"])
    with pytest.raises(ConfigError, match="password"):
        sources.refuse_passwords("path", ["ftp://user:secret@host/a.jsonl"])


def test_a_bound_that_is_no_bound_takes_no_memory(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    cfg = Config(path=(str(tmp_path / "a.txt"),), tokenizer="byte", max_document_bytes=10**15)
    assert "6 bytes" in corpus.build(cfg).summary()


@pytest.mark.parametrize("path", ["~nobody_of_that_name/a.txt", "~notes.txt"])
def test_a_path_with_a_tilde_of_nobody_is_a_path(path):
    with pytest.raises(ConfigError, match=r"data\.path"):
        corpus.build(Config(path=(path,), tokenizer="byte"))


def test_what_is_skipped_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))

    class Raw(io.FileIO):
        def read(self, size=-1):
            assert self.tell() >= 50
            return super().read(size)

    with Raw(tmp_path / "a") as raw:
        compressed.skip(raw, 50)
        assert raw.read(1) == bytes([50])
