"""The language of a document."""

import pytest

from lm.data import cleaning

TEXTS = {
    "en": "The committee will meet again in the spring to discuss the results of the survey.",
    "de": "Der Ausschuss wird im Frühjahr wieder zusammenkommen, um die Ergebnisse zu besprechen.",
    "fr": "Le comité se réunira de nouveau au printemps pour examiner les résultats de l'enquête.",
    "zh": "委员会将在春天再次开会讨论调查的结果。",
    "ja": "委員会は春に再び集まり、調査の結果について話し合います。",
    "ko": "위원회는 봄에 다시 모여 설문 조사 결과를 논의할 것입니다.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_each_language_is_kept_where_it_is_named(language):
    assert cleaning.open_cleaner(f"language keep={language}").clean(TEXTS[language]).text
    others = ",".join(other for other in TEXTS if other != language)
    cleaned = cleaning.open_cleaner(f"language keep={others}").clean(TEXTS[language])
    assert (cleaned.dropped_by, cleaned.reason) == ("language", language)


def test_a_text_of_no_language_is_not_known_well_enough():
    cleaner = cleaning.open_cleaner("language keep=en")
    assert cleaner.clean("3.14159 / 2.71828 = 1.15573").reason == "min_probability"
    assert cleaning.open_cleaner("language keep=en min_probability=1").clean(TEXTS["en"]).reason


def test_cantonese_is_chinese_unless_it_is_asked_for():
    text = "佢哋而家喺屋企食緊飯，唔知你幾時先嚟到呢度呀？我哋等咗你好耐喇。"
    assert cleaning.open_cleaner("language keep=zh").clean(text).text
    assert cleaning.open_cleaner("language keep=yue").clean(text).text
    assert not cleaning.open_cleaner("language keep=en").clean(text).text


def test_a_long_document_is_read_at_its_beginning_middle_and_end():
    cleaner = cleaning.open_cleaner("language keep=en")
    assert cleaner.clean(TEXTS["en"] * 100 + TEXTS["de"] * 10 + TEXTS["en"] * 200).text
    assert not cleaner.clean(TEXTS["en"] * 10 + TEXTS["de"] * 200).text
    little, much = TEXTS["en"] * 20, TEXTS["de"] * 200
    assert cleaner.clean(little + much + little + much + little).text
