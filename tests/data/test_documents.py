"""What is read of tables and records: empty ones, lines that end in any way, fields in fields."""

import json

import pytest

from lm.config import ConfigError
from lm.data import sources


def opened(*path, **options):
    settings = {"fields": sources.Fields(), "on_invalid": "replace", **options}
    return sources.open_source("python_docs", path=list(map(str, path)), **settings)


def texts(source):
    return [document.text for document in source]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("field", ["text", "0"])
def test_a_table_without_rows_is_skipped(tmp_path, kind, field):
    (tmp_path / f"a.{kind}").write_bytes(b"\n")
    (tmp_path / f"b.{kind}").write_bytes(b"text\nsome\n"[5 * (field == "0") :])
    source = opened(tmp_path / f"*.{kind}", on_broken="skip", fields=sources.Fields(field))
    assert [(d.text, d.broken) for d in source] == [("", "empty file"), ("some", "")]
    assert not list(source.read(0, 1)) and next(source.read(1)).text == "some"
    with pytest.raises(ConfigError, match=rf"a\.{kind} is empty; .*data\.on_broken=skip"):
        list(opened(tmp_path / f"*.{kind}", fields=sources.Fields(field)))


def test_a_field_inside_a_field_unless_its_name_has_the_dot(tmp_path):
    rows = [{"a": {"b": {"c": "deep"}}}, {"a.b.c": "flat", "a": {"b": {"c": "no"}}}, {"a": "no"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(tmp_path / "a.jsonl", fields=sources.Fields("a.b.c"), on_broken="skip")
    assert texts(source) == ["deep", "flat", ""]


def test_tables_are_read_line_by_line_as_they_were_at_once(tmp_path):
    """Lines that end in any way, quotes over lines, invalid bytes, a mark of the byte order."""
    content = b'\xef\xbb\xbfn,text\r1,"a\r\nb"\r\n\r\n2,\xff\xfe\n3,"c\n\n""d"""\n4,\xef\xbb\xbfe'
    (tmp_path / "a.csv").write_bytes(content)
    documents = list(opened(tmp_path / "a.csv"))
    assert [d.text for d in documents] == ["a\r\nb", "\ufffd\ufffd", 'c\n\n"d"', "\ufeffe"]
    assert [d.replaced for d in documents] == [0, 2, 0, 0]
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbftext\tn\r\n a\rb \t1\r\n \t\n"c\t\xff\r\r\n')
    documents = list(opened(tmp_path / "a.tsv"))
    assert [(d.text, d.replaced) for d in documents] == [(" a\rb ", 0), ('"c', 1)]
    (tmp_path / "b.csv").write_bytes(b"\xff,text\r1,\xff\r2,two")
    assert [d.replaced for d in opened(tmp_path / "b.csv")] == [2, 0]
