"""Near-duplicates: the threshold, any script, and what of a prompt is compared."""

import random

import pytest
from datasketch import MinHash, MinHashLSH

from distill.corpus.corpus import deduplicate
from distill.corpus.near_duplicates import Sketches, near_repeats, shingles
from distill.corpus.readers import Reject
from distill.records import Document

ALPHABETS = {  # letters of languages that are written without spaces, and of one with
    "zh": "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下",
    "ja": "のにはをたがでてとしれさいあるいるもこなまかよけどつわりみ日本人年大国会中上東学生",
    "th": "กขคงจชซญดตถทนบปผพมยรลวสหอาิีุูเแโใไ่้็",
    "en": "abcdefghijklmnopqrstuvwxyz",
}


def test_h17_near_repeats_without_words():
    """H17: Korean without spaces, and scripts of which nothing is known."""
    for first in (0xAC00, 0xA984, 0xFF66):
        letters = [chr(first + random.Random(n).randrange(41)) for n in range(400)]
        texts = ["".join(letters), "".join(letters[:390]), "".join(letters[::-1])]
        documents = [Document.make(text, f"a:{n}", {}) for n, text in enumerate(texts)]
        assert near_repeats(documents, 0.8) == {1: 0}


def made(language: str, seed: int, size: int = 400) -> str:
    draw, letters = random.Random(seed), ALPHABETS[language]
    if language == "en":
        return " ".join("".join(draw.choices(letters, k=5)) for _ in range(size // 4))
    return "".join(draw.choices(letters, k=size))


def prompt(text: str, *before: tuple[str, str], source: str = "a") -> Document:
    turns = [{"role": role, "content": content} for role, content in (*before, ("user", text))]
    whole = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    return Document.make(whole if before else text, source, {"messages": turns})


def repeats(documents: list[Document], threshold: float = 0.85) -> dict[int, int]:
    return near_repeats(documents, threshold)


def test_near_repeats_are_found_at_the_threshold_and_others_are_not():
    words = [f"word{n}" for n in range(100)]
    one_word = [*words[:50], "other", *words[51:]]  # 5 of 96 shingles differ: 91 / 101
    five_words = [word if n % 20 else "other" for n, word in enumerate(words)]
    texts = [" ".join(words), " ".join(one_word).upper(), " ".join(five_words)]
    # short texts are compared in full
    texts += ["two words", "two  Words", "two others"]
    documents = [Document.make(text, "a") for text in texts]
    assert repeats(documents, 0.8) == {1: 0, 4: 3}


@pytest.mark.parametrize("language", ALPHABETS)
def test_near_repeats_are_found_in_every_script(language):
    """H17, A11: without spaces, characters are what words are."""
    texts = [made(language, seed, 900) for seed in range(20)]
    near = [text[:200] + ALPHABETS[language][:1] + text[201:] for text in texts]
    documents = [Document.make(text, "a") for text in [*texts, *near]]
    assert repeats(documents) == {place + 20: place for place in range(20)}


@pytest.mark.parametrize("language", ALPHABETS)
@pytest.mark.parametrize("shape", ["system", "beginning", "end", "both", "turns"])
def test_only_what_differs_of_prompts_is_compared(language, shape):
    """A1: 200 prompts of twenty words under 250 that they share all stay."""
    shared, end = made(language, 0, 1200), made(language, 1, 300)
    own = [made(language, seed, 80) for seed in range(2, 202)]
    documents = {
        "system": [prompt(text, ("system", shared)) for text in own],
        "beginning": [prompt(f"{shared}\n\n{text}") for text in own],
        "end": [prompt(f"{text}\n\n{shared}") for text in own],
        "both": [prompt(f"{shared}\n{text}\n{end}") for text in own],
        "turns": [
            prompt(text, ("user", shared), ("assistant", end), ("user", "Go on.")) for text in own
        ],
    }[shape]
    assert len(deduplicate(documents, [], 0.85)) == 200


def test_copies_of_a_prompt_go_whatever_they_share():
    """A1: in letter case and spacing alone, or in a few words of a long own part."""
    shared = made("en", 0, 1200)
    own = [made("en", seed, 600) for seed in range(1, 31)]
    near = [text.replace(" ", "  ").upper() for text in own]
    near = [f"{shared}\n\n{text}" for text in near]
    near += [f"{shared}\n\n{text} thanks" for text in own[:5]]
    documents = [prompt(text) for text in [*(f"{shared}\n\n{text}" for text in own), *near]]
    assert repeats(documents) == {30 + n: n for n in range(30)} | {60 + n: n for n in range(5)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # the same question under two persons, after two histories, and about two passages
        (("Who are you?", ("system", made("en", 1))), ("Who are you?", ("system", made("en", 2)))),
        (("Go on.", ("user", made("en", 1))), ("Go on.", ("user", made("en", 2)))),
        # two questions about one passage, which no third row has
        ((f"{made('en', 1)} When did the war of the roses end?",),
         (f"{made('en', 1)} Which king was the last to fall in it?",)),
    ],
)  # fmt: skip
def test_prompts_that_share_most_of_their_text_stay(first, second):
    """A1: two prompts differ if what is asked does."""
    assert repeats([prompt(*first), prompt(*second)]) == {}


def test_a_warning_says_where_many_go(capsys):
    """A1: more than a fifth of the documents."""
    texts = [made("en", seed) for seed in range(8)]
    rejects: list[Reject] = []
    few = [Document.make(text, "a") for text in [*texts, f"{texts[0]} end", f"{texts[1]} end"]]
    assert len(deduplicate(few, rejects, 0.8)) == 8 and len(rejects) == 2
    assert "warning" not in capsys.readouterr().err
    deduplicate([*few, Document.make(f"{texts[2]} end", "a")], rejects, 0.8)
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 11 documents (27%) are left out as nearly the same" in said
    assert "corpus.near_duplicate_threshold" in said


def test_a_limit_changes_no_verdict():
    texts = [made("en", seed % 40) + " and so on" * (seed >= 40) for seed in range(80)]
    documents = [Document.make(text, "a") for text in texts]
    few, whole = near_repeats(documents, 0.8, 50), near_repeats(documents, 0.8)
    assert few == {place: other for place, other in whole.items() if place <= max(few)}


def test_bands_are_those_of_datasketch():
    """What two texts share decides as it did when datasketch held the index."""
    index = MinHashLSH(threshold=0.85, num_perm=128)
    sketches, texts = Sketches(0.85), [made("en", seed % 8, 300) for seed in range(16)]
    texts = [f"{text} {made('en', seed, 40)}" for seed, text in enumerate(texts)]
    hashes = [sketches.of(text) for text in texts]
    for place, text in enumerate(texts):
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([gram.encode() for gram in shingles(text)])
        ours = [n for n in range(place) if (hashes[n] == hashes[place]).any()]
        assert {*index.query(sketch)} == {*ours}
        index.insert(place, sketch)
