"""What points to a person, replaced by a placeholder."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lm.config import ConfigError
from lm.data.cleaning.step import Step

# Nothing is masked that touches a placeholder, so that a masked text stays as it is. Every repetition has a
# bound, so that the time is linear in the text.
_APART = r"(?<!EMAIL>)(?<!PHONE>)(?<!CARD>)(?<!IP>)"
_ALONE = r"(?!<(?:EMAIL|PHONE|CARD|IP)>)"
# Latin to Cyrillic: in a script without blanks an address begins where its letters end.
_LETTER = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u052f"


def _pattern(body: str, *, before: str = r"[\w.+-]", after: str = r"[\w-]|\.\d") -> re.Pattern[str]:
    return re.compile(f"{_APART}(?<!{before})(?:{body})(?!{after}){_ALONE}", re.ASCII)


_EMAIL = _pattern(
    rf"[\d{_LETTER}][\d{_LETTER}_.+-]{{0,63}}@"
    rf"(?:[\d{_LETTER}](?:[\d{_LETTER}-]{{0,61}}[\d{_LETTER}])?\.){{1,8}}[{_LETTER}]{{2,24}}",
    before=rf"[\d{_LETTER}]",
    after=rf"[\d{_LETTER}@-]",
)
_IPV4 = _pattern(r"(?:\d{1,3}\.){3}\d{1,3}", before=r"[\w.]", after=r"\w|\.\d")
_IPV6 = _pattern(
    r"[23][\dA-Fa-f]{3}:[\dA-Fa-f:]{0,33}(?:[\dA-Fa-f]|::)",
    before=r"[\w:.]",
    after=r"\w|:[\w:]|\.\d",
)
_CARD = _pattern(
    r"(?=[2-6])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}|3\d{3}([ -])\d{6}\2\d{4,5})"
)
_PHONE = _pattern(
    r"\+[1-9]\d{0,2}(?:[ ./-]?\(?\d{1,4}\)?){2,6}"  # international
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}"  # North America
    r"|(?:\(0[1-9]\d{0,3}\) ?|0[1-9]\d{0,3}[ /-])\d{3,5}[ -]?\d{3,5}"  # area code and number
    r"|0[1-9](?:[ .-]\d{2}){4}"  # France
    r"|1[3-9]\d{9}"  # mobile in China
)

_NO_PHONE = re.compile(  # a decimal with its sign; a month and years
    r"\+\d+\.\d+|0[1-9][ /-](?:19|20)\d{2}[ -](?:19|20)\d{2}"
)


def _is_public(found: str) -> bool:
    if re.fullmatch(r"\d(?:\.\d){3}", found):  # a version, a section, a formula
        return False
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_card(found: str) -> bool:
    """Return whether the last digit checks the others (ISO/IEC 7812-1, annex B: Luhn)."""
    digits = [int(character) for character in found if character.isdecimal()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[::-2])) % 10 == 0


def _is_phone(found: str) -> bool:
    return 8 <= sum(map(str.isdecimal, found)) <= 15 and not _NO_PHONE.fullmatch(found)


# In this order: an address may look like a number.
_KINDS: dict[str, tuple[tuple[re.Pattern[str], ...], Callable[[str], bool]]] = {
    "email": ((_EMAIL,), bool),
    "ip": ((_IPV4, _IPV6), _is_public),
    "card": ((_CARD,), _is_card),
    "phone": ((_PHONE,), _is_phone),
}
_NEEDED = {kind: re.compile("@" if kind == "email" else "[0-9]") for kind in _KINDS}


@dataclass(frozen=True)
class Mask(Step):
    """Replace e-mail and public IP addresses, card and phone numbers by <EMAIL>, <IP>, <CARD> and <PHONE>.

    A card number has 13 to 19 digits, grouped as on cards or not at all, and its check digit. IP addresses
    are masked where they can be reached from anywhere (of IPv6, 2000::/3), but for four single digits as in
    8.8.8.8, which are more often a version. Phone numbers are international with a plus, or written as in
    North America, with an area code from 0, as in France, or mobile in China; others stay, as they look like
    any number.
    """

    TARGETS: ClassVar[bool] = True

    kinds: tuple[str, ...] = tuple(_KINDS)  # email, ip, card, phone

    def __post_init__(self):
        for kind in self.kinds:
            if kind not in _KINDS:
                raise ConfigError(f"kinds={kind}: no such kind; use some of {','.join(_KINDS)}")

    def __call__(self, text: str) -> tuple[str, str]:
        for kind, (patterns, check) in _KINDS.items():
            if kind not in self.kinds or not _NEEDED[kind].search(text):
                continue

            def placeholder(match: re.Match[str], kind=kind, check=check) -> str:
                return f"<{kind.upper()}>" if check(match[0]) else match[0]

            for pattern in patterns:
                text = pattern.sub(placeholder, text)
        return text, ""
