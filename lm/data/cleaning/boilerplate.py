"""What a site writes around its text: navigation, notices, lines again and again."""

import collections
import re
from dataclasses import dataclass

from lm.data.cleaning import segmentation
from lm.data.cleaning.c4 import POLICY
from lm.data.cleaning.step import Step, check_least

_NOTICES = (*POLICY, "terms of service", "terms and conditions", "cookie settings", "accept cookies",
            "accept all cookies", "all rights reserved", "powered by wordpress", "enable javascript",
            "subscribe to our newsletter", "sign up for our newsletter", "skip to content",
            "skip to main content", "skip to navigation", "jump to navigation", "share on facebook",
            "share on twitter", "alle rechte vorbehalten", "datenschutzerklärung", "tous droits réservés",
            "todos los derechos reservados", "版权所有", "保留所有权利", "隐私政策", "プライバシーポリシー",
            "利用規約")  # fmt: skip
_MENU = {
    "home", "about", "about us", "contact", "contact us", "news", "blog", "login", "log in", "sign in",
    "sign up", "register", "search", "menu", "help", "faq", "sitemap", "site map", "privacy", "terms",
    "legal", "careers", "jobs", "shop", "cart", "my account", "account", "products", "services",
    "support", "rss", "next", "previous", "back", "top", "share", "tweet", "print", "email", "facebook",
    "twitter", "instagram", "youtube", "linkedin", "archive", "archives", "categories", "tags",
    "comments", "reply", "read more", "more", "subscribe", "newsletter", "events", "forum", "forums",
    "gallery", "downloads", "首页", "关于我们", "联系我们", "登录", "注册", "新闻",
}  # fmt: skip
_BETWEEN = re.compile(r"[|·•»›>/\t]")


@dataclass(frozen=True)
class Boilerplate(Step):
    """Take out short lines that are notices (cookies, terms, rights) or menus, and repeats of a line.

    A menu is two or more of the usual entries with a bar, dot, arrow or tab between them. Of the same line
    the first `repeats` stay; a short one, such as a speaker's name, may come as often as it likes.
    """

    max_words: int = 30  # of a line that may be a notice or a menu
    repeats: int = 3  # of the same line that stay
    min_repeat_length: int = 20  # letters of a line whose repeats are taken out

    def __post_init__(self):
        check_least(self, max_words=1, repeats=1, min_repeat_length=0)

    def __call__(self, text: str) -> tuple[str, str]:
        seen: collections.Counter[str] = collections.Counter()
        kept = []
        for line in text.split("\n"):
            bare = line.strip()
            seen[bare] += 1
            again = seen[bare] > self.repeats
            if again and segmentation.count_letters(bare) >= self.min_repeat_length:
                continue
            if not (bare and self._is_boilerplate(bare)):
                kept.append(line)
        return "\n".join(kept), ""

    def _is_boilerplate(self, line: str) -> bool:
        lower = line.lower()
        entries = [entry for entry in map(str.strip, _BETWEEN.split(lower)) if entry]
        found = any(notice in lower for notice in _NOTICES) or (
            len(entries) > 1 and all(entry in _MENU for entry in entries)
        )
        return found and segmentation.count_words(line) <= self.max_words
