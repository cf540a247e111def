"""Which language a text is in, and where its questions end."""

from pathlib import Path

import pytest
import yaml

from distill.languages import language_of, main_language

TEXTS = yaml.safe_load(Path("tests/fixtures/languages.yaml").read_text(encoding="utf-8"))


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
