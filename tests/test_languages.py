"""Which language a text is in, and where its questions end."""

import pytest

from distill.languages import language_of, main_language

TEXTS = {
    "English": "The wall was built over many centuries, and it is one of the longest in the world.",
    "Chinese": "长城是中国古代的伟大建筑，修建了很多个世纪。",
    "Japanese": "万里の長城は何世紀にもわたって築かれました。",
    "Korean": "만리장성은 여러 세기에 걸쳐 지어졌다.",
    "Thai": "กำแพงเมืองจีนสร้างขึ้นตลอดหลายศตวรรษ",
    "Arabic": "بُني السور على مدى قرون عديدة، وهو من أطول الأسوار في العالم.",
    "Hebrew": "החומה נבנתה במשך מאות שנים והיא מן הארוכות בעולם.",
    "Hindi": "यह दीवार कई शताब्दियों में बनाई गई थी और दुनिया की सबसे लंबी दीवार है।",
    "Russian": "Стену строили много веков, и она одна из самых длинных в мире.",
    "Spanish": "La muralla se construyó a lo largo de muchos siglos y es una de las más largas.",
    "French": "La muraille a été construite au fil des siècles et est une des plus longues.",
    "German": "Die Mauer wurde über viele Jahrhunderte gebaut und ist eine der längsten der Welt.",
    "Portuguese": "A muralha foi construída ao longo de muitos séculos e é uma das mais longas.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_language_is_told_by_script_and_common_words(language):
    """A11."""
    assert language_of(TEXTS[language]) == language


@pytest.mark.parametrize("text", ["", "12 + 15 = 27", "def f(x):\n    return x[0]", "{}[]"])
def test_what_is_in_no_language_is_none(text):
    assert language_of(text) is None


def test_a_corpus_is_in_the_language_of_most_texts():
    assert main_language([TEXTS["Thai"], TEXTS["Thai"], TEXTS["English"], "1 + 1"]) == "Thai"
    assert main_language([TEXTS["Thai"], TEXTS["English"]]) is None
    assert main_language([]) is None
