"""Every source yields the same documents every time, and says what is wrong with its input."""

import functools
import gzip
import json

import pytest
import zstandard

from lm.config import ConfigError
from lm.data import corpus, prepare, sources
from lm.data import library as library_source
from lm.data.settings import Config

INNER = "And another one, also long enough to be counted here."
LONG = f"A paragraph of the reference that is long enough to count.\n\n{INNER}"
TOPICS = f"topics = {{'b-long': {LONG!r}, 'a-inner': {INNER!r}, 'c-short': 'Tiny.'}}\n"
MODULE = '''"""The docstring of the module, forty characters and more."""
open({trace!r}, "w")
if True:
    class Thing:
        """The docstring of the class, forty characters and more."""
        async def act(self):
            """The docstring of the class, forty characters and more."""
        def other(self):
            "Too short."
'''


def read(source="text", path=(), field="text", on_invalid="replace"):
    path = [str(p) for p in ([path] if not isinstance(path, (list, tuple)) else path)]
    return list(
        sources.open_source(source, path=path, fields=sources.Fields(field), on_invalid=on_invalid)
    )


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "library"
    files = {
        "pydoc_data/topics.py": TOPICS,
        "zebra.py": MODULE.format(trace=str(tmp_path / "imported")),
        "alpha/__init__.py": '"""Words of the package alpha, which are forty and more."""\n',
        "alpha/broken.py": "def (:\n",
        "alpha/empty.py": "",
        "alpha/latin.py": "# coding: latin-1\nx = 'é'\n",
        "test/case.py": '"""A docstring of a test, which must not be read at all."""\n',
        "alpha/tests/case.py": '"""A docstring of a test, which must not be read at all."""\n',
        "site-packages/more.py": '"""A docstring of a package, which must not be read."""\n',
        "_sysconfigdata_x.py": '"""This machine\'s settings, which must not be read at all."""\n',
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode("latin-1" if "latin" in name else "utf-8"))
    monkeypatch.setattr(library_source, "library_folder", lambda: root)
    return root


def test_python_docs_holds_topics_then_docstrings_without_repeats(library, tmp_path):
    texts = [document.text for document in read("python_docs")]
    assert texts == [
        LONG,
        "Tiny.",
        "alpha\n\nWords of the package alpha, which are forty and more.\n",
        "zebra\n\nThe docstring of the module, forty characters and more.\n\n\n"
        "zebra.Thing\n\nThe docstring of the class, forty characters and more.\n",
    ]
    assert not (tmp_path / "imported").exists()


def test_python_source_holds_valid_files_in_order_of_name(library, tmp_path):
    texts = [document.text for document in read("python_source")]
    names = ["alpha/__init__", "alpha/empty", "alpha/latin", "zebra"]
    expected = [(library / f"{name}.py").read_bytes() for name in names]
    assert [text.encode("latin-1") for text in texts] == expected
    assert not (tmp_path / "imported").exists()


def test_a_source_reads_the_same_again(library):
    source = sources.open_source(
        "python_docs", path=(), fields=sources.Fields(), on_invalid="replace"
    )
    assert list(source) == list(source) == read("python_docs")


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.csv", "a.txt", "python_docs"])
def test_a_part_is_read_from_any_record_on(tmp_path, library, name):
    rows = [f"text {i}" for i in range(7)]
    lines = {
        "a.jsonl": "\n\n".join(json.dumps({"text": row}) for row in rows),
        "a.tsv": "\n\n".join(["text", *rows]),
        "a.csv": "\n".join(["text", *rows]),
    }
    paths = [] if name == "python_docs" else [tmp_path / name, tmp_path / f"b{name}"]
    for path in paths:
        path.write_text(lines.get(name, "one text"))
    source = sources.open_source(
        "python_docs", path=list(map(str, paths)), fields=sources.Fields(), on_invalid="replace"
    )
    assert source.parts == (tuple(map(str, paths)) or ("python_docs",))
    parts = [list(source.read(part)) for part in range(len(source.parts))]
    assert len(parts[-1]) == {"a.txt": 1, "python_docs": 4}.get(name, 7)
    assert list(source) == [document for part in parts for document in part]
    for start in range(9):
        assert list(source.read(len(parts) - 1, start)) == parts[-1][start:]


@pytest.mark.slow
def test_the_real_library_is_english_and_code_of_the_promised_size():
    docs, code = read("python_docs"), read("python_source")
    assert docs[0].text.startswith('The "assert" statement')
    assert 1.5e6 < sum(len(document.text) for document in docs) < 4e6
    assert 8e6 < sum(len(document.text) for document in code) < 16e6
    assert not any("import idlelib" in document.text[:1000] for document in code)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_is_one_document_a_file_as_it_is(tmp_path, suffix):
    content = "\ufeffLine one\r\n\tzwei ü\n".encode()
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    # Two members one after the other are one file, as `cat a.gz b.gz` makes it.
    (tmp_path / f"b.txt{suffix}").write_bytes(packed + packed if suffix else content)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    texts = [document.text for document in read(path=tmp_path / f"*.txt{suffix}")]
    assert texts[0] == "Line one\r\n\tzwei ü\n"
    assert texts[1] == texts[0] + ("\ufeff" + texts[0] if suffix else "")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_yields_the_field_of_every_line(tmp_path, suffix):
    rows = [{"body": f"text {i} ü\n", "n": i} for i in range(5000)]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    # The suffix decides while data.source stands at an embedded corpus.
    documents = read("python_docs", tmp_path / f"a.jsonl{suffix}", field="body")
    assert [document.text for document in documents] == [row["body"] for row in rows]


def test_invalid_bytes_are_replaced_and_counted_or_refused_with_their_place(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"ok \xff\xfe \xe2\x82 \xef\xbf\xbd end")  # the last one is U+FFFD itself
    ((text, replaced, *_),) = read(path=file)
    assert text == "ok \ufffd\ufffd \ufffd \ufffd end"
    assert replaced == 3
    with pytest.raises(ConfigError, match=r"a\.txt: byte 3 is not UTF-8"):
        read(path=file, on_invalid="refuse")


def test_invalid_bytes_and_surrogates_in_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    first = b'{"text": "fine"}\n'
    file.write_bytes(first + b'{"text": "\xff\\ud800"}\n')
    assert [document.replaced for document in read("jsonl", file)] == [0, 2]
    with pytest.raises(ConfigError, match=rf"a\.jsonl:2: byte {len(first) + 10} is not UTF-8"):
        read("jsonl", file, on_invalid="refuse")
    file.write_bytes(b'{"text": "\\ud800"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: a lone surrogate"):
        read("jsonl", file, on_invalid="refuse")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), r"a\.txt\.gz is empty"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-9], r"a\.txt\.gz is damaged"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 999, mtime=0)[:20] + b"\0" * 9,
            r"a\.txt\.gz is damaged",
        ),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged"),
        ("a.txt.zst", zstandard.compress(bytes(range(256)))[:-9], r"a\.txt\.zst is damaged"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst is damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r"data\.field=text: .*a\.jsonl:3 .*body"),
        ("a.jsonl", b'{"text": 3}\n', r"data\.field=text: .*a\.jsonl:1 "),
        ("a.jsonl", b"[1, 2]\n", r"data\.field=text: .*a\.jsonl:1 .*no object"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.tsv.gz", gzip.compress(b"\n\n", mtime=0), r"a\.tsv\.gz is empty"),
    ],
)
def test_broken_input_is_an_error_of_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read("python_docs", tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("text", ["missing.txt"], r"data\.path=.*missing\.txt: no such file"),
        ("text", ["*.none"], r"data\.path=.*\*\.none: no file matches"),
        ("text", ["folder"], r"data\.path=.*folder: a folder"),
        ("python_docs", ["a.txt", "b.jsonl"], r"both jsonl and text"),
        ("python_docs", ["?.*"], r"b\.jsonl looks like jsonl"),
    ],
)
def test_a_path_that_names_no_readable_file_is_an_error(tmp_path, source, path, message):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        read(source, [tmp_path / name for name in path])


def test_unknown_sources_and_files_without_a_path_are_refused():
    with pytest.raises(ConfigError, match=r"data\.source=web: no such source; use one of"):
        sources.resolve("web", ())
    with pytest.raises(ConfigError, match=r"data\.source=jsonl: no files named; set data\.path"):
        sources.resolve("jsonl", ())


def test_the_fingerprint_is_of_the_content(tmp_path):
    def fingerprint(name, content, field="text"):
        (tmp_path / name).write_text(content)
        source = sources.open_source(
            "python_docs",
            path=[str(tmp_path / name)],
            fields=sources.Fields(field),
            on_invalid="replace",
        )
        return source.fingerprint()

    assert fingerprint("a.txt", "one") == fingerprint("b.txt", "one")
    assert fingerprint("a.txt", "one") != fingerprint("a.txt", "two")
    assert fingerprint("a.jsonl", "{}", "text") != fingerprint("a.jsonl", "{}", "body")


def test_a_remote_file_that_changes_while_it_is_read_is_refused(memory, tmp_path, monkeypatch):
    memory.pipe("/a.txt", b"text of the first")
    add = prepare.Writer.add

    def changing(self, encoded):
        add(self, encoded)
        memory.pipe("/a.txt", b"text of another")

    monkeypatch.setattr(prepare.Writer, "add", changing)
    with pytest.raises(ConfigError, match=r"memory://a\.txt changed while it was read"):
        corpus.prepare_in(tmp_path / "made", Config(path=("memory://a.txt",), tokenizer="byte"))
    assert not (tmp_path / "made/manifest.json").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_so_is_one_that_changes_behind_its_fingerprint(memory, tmp_path, monkeypatch, remote):
    place, path = tmp_path / "a.txt", "memory://a.txt" if remote else str(tmp_path / "a.txt")
    write = functools.partial(memory.pipe, "/a.txt") if remote else place.write_bytes
    write(b"text of the first")
    fingerprint = sources.Source.fingerprint

    def changing(self):
        found = fingerprint(self)
        write(b"text of another")
        return found

    monkeypatch.setattr(sources.Source, "fingerprint", changing)
    with pytest.raises(ConfigError, match=r"a\.txt changed while it was read"):
        corpus.prepare_in(tmp_path / "made", Config(path=(path,), tokenizer="byte"))


def test_what_is_known_of_a_remote_file_is_asked_for_anew(memory, monkeypatch):
    memory.pipe("/a.txt", b"text")
    source, asked = corpus._inputs(Config(path=("memory://a.txt",)), None)[0], []
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda self, path=None: asked.append(0))
    first = source.states()
    assert not asked and source.states(anew=True) == first and asked == [0]
