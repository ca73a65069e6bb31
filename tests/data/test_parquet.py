"""Parquet files are read by row groups, only the columns that are asked for, and what is damaged is told."""

import io

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import files, parquet, sources

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [f"text {i} ü {'x' * 200}" for i in range(1000)]


def opened(path, on_broken="refuse", on_invalid="replace", max_bytes=1 << 28, **fields):
    return sources.open_source(
        "python_docs",
        path=[str(path)],
        fields=sources.Fields(**fields),
        on_invalid=on_invalid,
        on_broken=on_broken,
        max_bytes=max_bytes,
    )


def write(path, columns, **options):
    pq.write_table(pyarrow.table(columns), path, **{"row_group_size": 100, **options})
    return path


def test_every_row_is_a_document_from_any_on(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH", 5000)  # several batches a row group
    source = opened(write(tmp_path / "a.parquet", {"n": range(1000), "text": ROWS}))
    documents = list(source)
    assert (documents[0].text, len(documents)) == (ROWS[0], 1000)
    assert [document.text for document in documents] == ROWS
    for start in (0, 1, 99, 100, 101, 555, 999, 1000, 1001):
        assert list(source.read(0, start)) == documents[start:]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_texts_of_any_type(tmp_path, kind):
    texts = pyarrow.array(["one", "zwei ü", "one"])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    file = write(tmp_path / "a.parquet", {"text": texts})
    assert [document.text for document in opened(file)] == ["one", "zwei ü", "one"]


def test_pairs_labels_and_fields_inside_fields(tmp_path):
    columns = {
        "deep": [{"body": "one", "no": 1}, {"body": "two", "no": 2}],
        "flat.name": ["three", "four"],
        "label": [0, 1],
    }
    file = write(tmp_path / "a.parquet", columns)
    pairs = [tuple(d)[:3] for d in opened(file, source="deep.body", target="flat.name")]
    assert pairs == [("one", 0, "three"), ("two", 0, "four")]
    assert [d.second for d in opened(file, source="deep.body", label="label")] == ["0", "1"]


def test_only_what_is_asked_for_is_read(tmp_path):
    """The bytes of another column may be anything."""
    file = write(tmp_path / "a.parquet", {"other": ROWS, "text": ["a"] * 1000})
    content = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(3).column(0)
    place = column.dictionary_page_offset or column.data_page_offset
    content[place : place + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    assert [document.text for document in opened(file)] == ["a"] * 1000
    with pytest.raises(ConfigError, match="row group 3 is damaged"):
        list(opened(file, text="other"))


def test_of_a_row_group_little_is_in_memory_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [rng.bytes(50_000).hex() for _ in range(80)]
    pages = {"use_dictionary": False, "data_page_size": 200_000, "write_batch_size": 2}
    file = write(tmp_path / "a.parquet", {"text": rows}, **pages)
    assert file.stat().st_size > 4_000_000
    sizes = []

    class Recorded(io.FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(files, "_raw", lambda name, seek: Recorded(name))
    assert [document.text for document in opened(file)] == rows
    assert len(sizes) > 4 and 0 < max(sizes) < 2 << 20


def test_a_damaged_row_group_is_refused_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH", 5000)
    pages = {"compression": "none", "write_page_checksum": True, "use_dictionary": False}
    pages |= {"data_page_size": 4000, "write_batch_size": 10}
    file = write(tmp_path / "a.parquet", {"text": ROWS}, **pages)
    content = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(3).column(0)
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"a\.parquet: row 3\d\d: row group 3 is damaged"
    ) as caught:
        list(opened(file))
    assert "\n" not in str(caught.value)
    documents = list(opened(file, on_broken="skip"))
    broken = [i for i, document in enumerate(documents) if document.broken]
    assert broken == list(range(broken[0], 400)) and 300 < broken[0] < 399
    assert f": row {broken[0]}: " in str(caught.value)
    assert {documents[i].broken for i in broken} == {"damaged row group"}
    assert [d.text for d in documents if d.text] == ROWS[: broken[0]] + ROWS[400:]
    for start in (299, broken[0], 399, 400):
        assert list(opened(file, on_broken="skip").read(0, start)) == documents[start:]


def test_a_row_longer_than_memory_bears_is_refused_or_skipped(tmp_path):
    file = write(tmp_path / "a.parquet", {"text": ["one", "long" * 1000, "two"]})
    skipped = [(d.text, d.broken) for d in opened(file, on_broken="skip", max_bytes=3999)]
    assert skipped == [("one", ""), ("", "too long"), ("two", "")]
    assert len(list(opened(file, max_bytes=4000))[1].text) == 4000
    with pytest.raises(ConfigError, match=r"a\.parquet: row 1 is longer than data\.max_doc"):
        list(opened(file, max_bytes=3999))


def test_rows_without_a_text_and_invalid_bytes(tmp_path):
    file = write(tmp_path / "a.parquet", {"text": [b"one", None, b"\xff\xfe", b"two"]})
    documents = list(opened(file, on_broken="skip"))
    assert [d.text for d in documents] == ["one", "", "\ufffd\ufffd", "two"]
    assert [d.broken for d in documents] == ["", "no such text", "", ""]
    assert [d.replaced for d in documents] == [0, 0, 2, 0]
    with pytest.raises(ConfigError, match=r"data\.field=text: .*a\.parquet: row 1 has no text"):
        list(opened(file))
    with pytest.raises(ConfigError, match=r"on_invalid=refuse: .*a\.parquet: row 2: byte 0"):
        list(opened(file, on_broken="skip", on_invalid="refuse"))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("body", r"data\.field=body: .*a\.parquet has no column by that name \(it has n, text\)"),
        ("text.body", r"data\.field=text\.body: .* no column"),
        ("n", r"data\.field=n: .*a\.parquet: a column of int64 is no text"),
    ],
)
def test_a_field_that_is_no_text_is_an_error(tmp_path, field, message):
    file = write(tmp_path / "a.parquet", {"n": [1], "text": ["a"]})
    with pytest.raises(ConfigError, match=message):
        list(opened(file, text=field))


@pytest.mark.parametrize("cut", [0, 4, -20])
def test_a_file_that_is_no_parquet(tmp_path, cut):
    file = write(tmp_path / "a.parquet", {"text": ROWS})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"a\.parquet is no Parquet file, or damaged"):
        list(opened(file))
    assert [d.broken for d in opened(file, on_broken="skip")] == ["damaged file"]
    assert not list(opened(file, on_broken="skip").read(0, 1))


def test_a_remote_file(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    file = write(tmp_path / "a.parquet", {"text": ROWS})
    fsspec.filesystem("memory").pipe("/p/a.parquet", file.read_bytes())
    assert list(opened("memory://p/a.parquet")) == list(opened(file))


def test_parquet_that_is_compressed_once_more_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet.zst", {"text": ROWS})
    with pytest.raises(
        ConfigError, match=r"a\.parquet\.zst: Parquet is read at any place, and \.zst"
    ):
        opened(file)
