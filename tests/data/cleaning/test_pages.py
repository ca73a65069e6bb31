"""HTML to text, and what is no HTML."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import cleaning

PAGE = """<!DOCTYPE html><html><head><title>T</title><script>if (a<b) x = "<div>";</script></head><body>
<nav><a href="/">Home</a> <a href="/a">About</a></nav>
<article><h1>On cats</h1><p>A cat sat &amp; <b>slept</b> on the mat for a long time.</p>
<p>第二段。全角，标点！</p></article><footer>Cookie policy</footer></body></html>"""


def clean(text, step="html"):
    return cleaning.open_cleaner(step).clean(text)


def test_a_page_becomes_its_text_without_what_is_around():
    assert clean(PAGE).text == (
        "On cats\n\nA cat sat & slept on the mat for a long time.\n\n第二段。全角，标点！"
    )
    whole = clean(PAGE, "html main_content=false").text
    assert "Home About" in whole and "Cookie policy" in whole and "x = " not in whole
    assert clean("\ufeff <?xml version='1.0'?>\n<!-- c --><HTML><p>x</p>").text == "x"
    assert clean(f"<!-- {'c ' * 9_000} -->\n<!-- c --><html><p>x</p>").text == "x"
    assert clean("<p>One</p><p>Two</p>\n").text == "One\n\nTwo"


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d",
        "Write <html> first, then </html>.",
        "<john> hi\n<mary> hello",
        '<p align="center"><img src="x.png"></p>\n\n# A project\n\nIts text, in Markdown.',
        "<?xml version='1.0'?><text>TEI</text>",
        "x = '<div>'",
        "&amp; stays",
    ],
)
def test_what_is_no_page_passes(text):
    assert clean(text).text == text and not clean(text).changed


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_that_does_not_begin_with_a_tag_passes(text):
    if not text.lstrip().startswith("<"):
        assert clean(text).text == text


def test_the_text_of_a_page_stays_as_it_is():
    once = clean(PAGE).text
    assert clean(once).text == once


def test_a_page_nested_too_deeply_is_dropped():
    def nested(open_, close, times):
        return clean(f"<html><p>text</p>{open_ * times}x{close * times}")

    assert "text" in nested("<div>", "</div>", 500).text
    assert nested("<div>", "</div>", 600).reason == "nested too deeply"
    assert nested("<ul><li>", "</li></ul>", 40).reason == "nested too deeply"
    assert "text" in nested("<p>", "", 2000).text  # they do not nest
    assert "text" in clean("<html><p>text<script>" + "i<n;" * 2000 + "</script>").text
