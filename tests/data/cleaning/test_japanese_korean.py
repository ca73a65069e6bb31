"""Japanese and Korean text passes unharmed: no step that rewrites changes a byte, and filters keep it."""

import pytest

from lm.data import cleaning

JAPANESE = [
    "　朝の六時に目を覚ますと、窓の外では雪が静かに降り続いていた。",
    "「今日は学校が休みになるかもしれないね」と、妹が嬉しそうに言った。",
    "駅前のコーヒーショップは、通勤客で毎朝とても混み合っている。",
    "東京から新大阪まで、新幹線のぞみ号で約２時間３０分かかります。",
    "人々は昔から、山々の神々に豊作を祈り、秋には祭りを行ってきた。",
    "消費税率は2019年10月に、8%から10%へ引き上げられた（軽減税率を除く）。",
    "彼女はドイツ語・フランス語・スペイン語の三か国語を話せるそうだ。",
    "夏目漱石の『吾輩は猫である』は、明治三十八年に雑誌で発表された。",
    "えっ、まさか本当に一人で富士山に登ったの！？信じられないなあ……。",
    "営業時間は午前10時〜午後8時、定休日は毎週火曜日と年末年始です。",
    "古いレシートには、ﾊﾝｶｸのｶﾀｶﾅで店の名前が印刷されていた。",
    "ヴァイオリンの音色が、ホールのすみずみまで響き渡っていった。",
    "つくばみらい市と鎌ヶ谷市では、六ヶ所の公園が新しく整備された。",
    "ＡＩの研究者たちは、言語モデルの学習に大量の文章を使っている。",
    "ラーメンを食べる時に音を立てても、日本では失礼にはあたらない。",
    "祖母が漬けた梅干しは、しょっぱいけれど、どこか懐かしい味がする。",
]
KOREAN = [
    "아침 여섯 시에 눈을 떠 보니 창밖에는 눈이 조용히 내리고 있었다.",
    "“오늘은 학교가 쉴지도 몰라.” 하고 그 여동생이 기쁜 듯이 말했다.",
    "역 앞의 작은 커피 가게는 출근하는 사람들로 매일 아침 붐빈다.",
    "서울에서 부산까지 고속 열차를 타면 약 2시간 30분이 걸린다.",
    "옛날부터 사람들은 가을이 되면 풍년을 빌며 산에서 제사를 지냈다.",
    "지난해 소비자 물가는 3.6% 올랐고, 실업률은 2.7%로 낮아졌다.",
    "그 학생은 독일어·프랑스어·스페인어를 모두 유창하게 할 수 있다.",
    "세종대왕은 1443년에 훈민정음(訓民正音)을 만들어 널리 알렸다.",
    "뭐라고? 정말 혼자서 한라산 꼭대기까지 올라갔다는 말이야?!",
    "영업 시간은 오전 10시~오후 8시이며, 매주 화요일은 쉽니다.",
    "할머니가 담근 김치는 조금 짜지만 어쩐지 그리운 맛이 난다.",
    "이 책은 『토지』와 함께 한국 문학을 대표하는 작품으로 꼽힌다.",
    "연구자들은 언어 모델을 가르치는 데 아주 많은 글을 쓰고 있다.",
    "바이올린 소리가 넓은 공연장 구석구석까지 맑게 울려 퍼졌다.",
    "넓은 들판을 가로질러 흐르는 강물은 서쪽 바다로 흘러 들어간다.",
    "값이 싸고 품질이 좋은 물건을 찾는 일은 생각보다 쉽지 않다.",
]
TEXTS = {"ja": JAPANESE, "ko": KOREAN}
# Stop words are English unless they are given; Japanese, without spaces, is not asked for any.
QUALITY = {"ja": "gopher_quality", "ko": "gopher_quality stop_words=그,이,수,있다,매일"}
WRITING = ("html", "mojibake", "unicode", "control", "whitespace", "boilerplate", "c4", "mask")


@pytest.fixture(scope="module", params=TEXTS)
def language(request):
    return request.param


def documents(language):
    """One with a line for each sentence, one of two paragraphs, and each four sentences in a line."""
    space = " " if language == "ko" else ""
    fours = [space.join(TEXTS[language][i : i + 4]) for i in range(0, 16, 4)]
    return [
        "\n".join(TEXTS[language]),
        f"{fours[0]}\n{fours[1]}\n\n{fours[2]}\n{fours[3]}\n",
    ], fours


@pytest.mark.parametrize("step", [*WRITING, ";".join(WRITING)])
def test_what_writes_does_not_change_a_byte(language, step):
    cleaner = cleaning.open_cleaner(step)
    long, fours = documents(language)
    if "c4" in step:  # takes blanks from lines, and a sentence alone is too short for it
        long = ["\n".join(line.strip() for line in text.split("\n") if line) for text in long]
        fours = [text.strip() for text in fours]
    else:
        fours = [*fours, *TEXTS[language]]
    for text in (*long, *fours):
        cleaned = cleaner.clean(text)
        assert (cleaned.text.encode(), cleaned.dropped_by) == (text.encode(), "")


@pytest.mark.parametrize("step", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_filters_keep_it(language, step):
    cleaner = cleaning.open_cleaner(QUALITY[language] if step == "gopher_quality" else step)
    for text in documents(language)[0]:
        assert cleaner.clean(text).dropped_by == "", cleaner.clean(text).reason


def test_its_language_is_known(language):
    keep, other = (cleaning.open_cleaner(f"language keep={code}") for code in (language, "zh,en"))
    long, fours = documents(language)
    for text in (*long, *fours, *TEXTS[language]):
        assert not keep.clean(text).dropped_by, text
        assert other.clean(text).dropped_by == "language"
