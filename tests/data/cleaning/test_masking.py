"""What is masked, and what looks like it and is not."""

import pytest

from lm.data import cleaning


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to joe.b+x@mail.example.co.uk.", "Write to <EMAIL>."),
        ("<a href='mailto:a@b.org'>", "<a href='mailto:<EMAIL>'>"),
        ("邮箱abc@qq.com。", "邮箱<EMAIL>。"),
        ("?to=joe@x.com&cc=_ann@x.org_", "?to=<EMAIL>&cc=_<EMAIL>_"),
        ("'joe@x.com' `joe@x.com` |joe@x.com|", "'<EMAIL>' `<EMAIL>` |<EMAIL>|"),
        ("https://x.com/joe@y.com", "https://x.com/<EMAIL>"),
        ("jürgen@müller.de, иван@почта.рф", "<EMAIL>, <EMAIL>"),
        ("at 8.8.4.40, port 80", "at <IP>, port 80"),
        ("from 2606:4700:4700::1111 on", "from <IP> on"),
        ("2606:4700:4700::1111: timeout, 2606:4700:: too", "<IP>: timeout, <IP> too"),
        ("card 4111 1111 1111 1111 and 378282246310005", "card <CARD> and <CARD>"),
        ("3782-822463-10005", "<CARD>"),
        ("3056 930902 5904, 3852-000002-3237.", "<CARD>, <CARD>."),
        ("Call +49 (0)30 1234567 or +1-202-555-0123.", "Call <PHONE> or <PHONE>."),
        ("Call (801) 596-1887, 202-555-0123 or 1-202.555.0123", "Call <PHONE>, <PHONE> or <PHONE>"),
        ("Tel. 030 1234567, (020) 7946 0958, 010-8888-9999", "Tel. <PHONE>, <PHONE>, <PHONE>"),
        ("Tél. 01 23 45 67 89; 手机13812345678。", "Tél. <PHONE>; 手机<PHONE>。"),
    ],
)
def test_masked(text, masked):
    assert cleaning.open_cleaner("mask").clean(text).text == masked


@pytest.mark.parametrize(
    "text",
    [
        "a@b, @name, joe@localhost, x@y.1, lm@v1.rc1",
        "10.0.0.12, 192.168.10.1, 127.0.0.1, 300.1.2.33, version 1.2.3.4, 1.20.3.4.5",
        "fe80::1, ::1, 12:30:45, std::vector, a::b",
        "4111 1111 1111 1112, 1234567890123456, 0000 0000 0000 0000",  # no check digit, no issuer
        "2024-01-02, 01-02-2024, 1,234,567.89, 3.14159265, ISBN 0-306-40615-2, 978-0-306-40615-7",
        "1500000000, 1700000000000, 12345678901234567890",
        "+3.14159265, -1.23456789, 05/1998-2003, 05/1998 - 2003",
        "pages 100-200, 555-0123, $ 300 400 5000, +1 23 45",
        "<EMAIL> <IP> <CARD> <PHONE>",
    ],
)
def test_not_masked(text):
    assert cleaning.open_cleaner("mask").clean(text).text == text


def test_only_the_kinds_that_are_named():
    text = "a@b.org 8.8.4.40 4111111111111111 +1 202 555 0123"
    assert cleaning.open_cleaner("mask kinds=ip,phone").clean(text).text == (
        "a@b.org <IP> 4111111111111111 <PHONE>"
    )
