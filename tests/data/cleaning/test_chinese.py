"""Chinese text passes unharmed: as written, and as often as its translation."""

import gzip
import json
from pathlib import Path

import pytest

from lm.data import cleaning

DATA = Path(__file__).parents[4] / "shared/data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
ALL_THAT_WRITE = "html;mojibake;unicode;whitespace;boilerplate;mask"
FILTERS = ("gopher_quality", "gopher_repetition", "c4", "fineweb")


def articles(language):
    data = json.loads((DATA / f"xquad/xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    return ["\n\n".join(part["context"] for part in article["paragraphs"]) for article in data]


def paragraphs(language):
    return [text for article in articles(language) for text in article.split("\n\n")]


def poems():
    for path in sorted((DATA / "chinese_poetry").glob("*.json")):
        for poem in json.loads(path.read_text(encoding="utf-8")):
            lines = poem["paragraphs"] if "paragraphs" in poem else poem["content"]
            yield "\n".join(lines) if isinstance(lines, list) else lines


def texts():
    yield from poems()
    yield from articles("zh")
    with gzip.open(DATA / "cmrc2018/cmrc2018_dev.json.gz") as file:
        for article in json.load(file)["data"]:
            yield from (part["context"] for part in article["paragraphs"])
    with gzip.open(DATA / "tatoeba_en_zh/cmn.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.split("\t")[1] for line in file]
    yield from ("\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20))


def passing(step, documents):
    cleaner = cleaning.open_cleaner(step)
    return sum(not cleaner.clean(text).dropped_by for text in documents) / len(documents)


def test_what_writes_does_not_change_a_byte():
    cleaner, without = cleaning.open_cleaner(ALL_THAT_WRITE), cleaning.open_cleaner("control")
    count = 0
    for text in texts():
        assert cleaner.clean(text).text == text
        # Some hold byte order marks and zero-width spaces.
        assert without.clean(text).text == text.replace("\ufeff", "").replace("\u200b", "")
        count += 1
    assert count > 3000


@pytest.mark.parametrize("step", FILTERS)
def test_as_many_documents_pass_as_of_their_translation(step):
    assert passing(step, articles("zh")) == passing(step, articles("en"))
    assert abs(passing(step, paragraphs("zh")) - passing(step, paragraphs("en"))) < 0.03


def test_language_knows_verse_prose_and_sentences():
    assert passing("language keep=zh", list(poems())) == 1
    assert passing("language keep=zh", paragraphs("zh")) == 1
    assert passing("language keep=zh", paragraphs("en")) == 0


def test_verse_is_dropped_only_where_it_is_short_or_repeats_itself():
    long = [text for text in poems() if len(text) > 100]
    assert len(long) > 150
    assert passing("gopher_quality", long) == 1
    assert passing("c4", long) > 0.95
    assert passing("fineweb", long) > 0.9
