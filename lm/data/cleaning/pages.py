"""HTML to text."""

import re
from dataclasses import dataclass
from typing import ClassVar

from lm.data.cleaning.step import Step

# Before the first tag come only an XML declaration, comments and blanks; a fragment also ends with a tag.
_BEFORE = r"(?:\s|\ufeff|<\?xml\b[^>]{0,200}>|<!--.*?-->)*+"
_PAGE = re.compile(rf"{_BEFORE}<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_FRAGMENT = re.compile(
    rf"{_BEFORE}<(?:main|article|section|header|footer|nav|aside|div|p|h[1-6]|table|ul|ol|dl|blockquote|pre|form|"
    r"center|font|span|a|b|i|em|strong|img|br|hr)\b",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]{0,15})")
# Elements that have no end, or whose next brother ends them: they do not nest by being left open.
_FLAT = {
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr",
    "p", "li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot", "option", "html", "head", "body",
}  # fmt: skip
_RAW = {"script", "style", "title", "textarea"}  # what looks like a tag in them is none
_INDENTED = {"ul", "ol", "dl", "menu", "blockquote"}
_DEEPEST, _MOST_INDENTED = 512, 32  # Blink refuses to nest deeper than 512


@dataclass(frozen=True)
class Html(Step):
    """Turn a page of HTML into its text; a document that does not begin as one passes unchanged.

    By Resiliparse (Bevendorff et al. 2018), the extractor of DCLM (Li et al. 2024, arXiv 2406.11794, section
    4.2), which found models as good as from trafilatura's text at an eighth of the time; trafilatura also
    needs a package under a copyleft licence. A page nested deeper than 512 elements, or 32 lists, is dropped,
    as the time (and by indentation the text) would grow with the square of its size. A page that shows HTML
    as its text gives HTML, so that this step alone may change its own result.
    """

    TARGETS: ClassVar[bool] = True
    LIBRARIES: ClassVar[tuple[str, ...]] = ("resiliparse",)

    main_content: bool = True  # leave out navigation, headers, footers and advertisements
    links: bool = False  # write the addresses of links after their text

    def __call__(self, text: str) -> tuple[str, str]:
        fragment = text.rstrip().endswith(">") and _FRAGMENT.match(text)
        if not (fragment or _PAGE.match(text)):
            return text, ""
        if _nests_too_deeply(text):
            return text, "nested too deeply"
        from resiliparse.extract import html2text

        page = text.lstrip("\ufeff \t\r\n")  # else the mark becomes a part of the text
        return html2text.extract_plain_text(
            page, main_content=self.main_content, links=self.links, alt_texts=False
        ), ""


def _nests_too_deeply(page: str) -> bool:
    """Return whether more elements are left open at some place than any page needs."""
    opened: dict[str, int] = {}
    depth = indented = 0
    raw = ""
    for closing, name in _TAG.findall(page):
        name = name.lower()
        if raw:
            raw = "" if closing and name == raw else raw
            continue
        if name in _RAW and not closing:
            raw = name
            continue
        if name in _FLAT:
            continue
        if not closing:
            opened[name] = opened.get(name, 0) + 1
            depth += 1
            indented += name in _INDENTED
            if depth > _DEEPEST or indented > _MOST_INDENTED:
                return True
        elif opened.get(name):
            opened[name] -= 1
            depth -= 1
            indented -= name in _INDENTED
    return False
