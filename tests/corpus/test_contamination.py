"""Contamination: planted leaks are found in every disguise, and clean sets stay clean."""

import random

import pytest

from distill.corpus import contamination
from distill.corpus.contamination import flag
from distill.corpus.ngrams import EvaluatedText, Index, words
from distill.corpus.prompts import ask
from distill.records import Document, Item
from distill.tasks.task import load_task
from scripts.benchmarks.benchmark_contamination import measure

VOCABULARY = [f"word{n}" for n in range(400)]


def text(seed: int, length: int = 40) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=length))


def found(item: str, document: str, **more: str) -> bool:
    """Tell whether an item, among others, is found in a document."""
    items = [
        EvaluatedText("1", "1", (item,), **more),
        *(EvaluatedText(f"o{k}", f"o{k}", (text(900 + k),)) for k in range(9)),
    ]
    return "1" in flag(Index(items), [("d", document)])


def test_planted_leaks_are_found_in_every_disguise_and_nothing_else():
    figures = measure(items=1500, documents=3000, length=120, leaks=500, seed=3)
    assert figures["found"] == 500, figures["missed"]
    assert figures["false_alarms"] == 0 and figures["documents_wrongly_flagged"] == 0


@pytest.mark.parametrize("bits", [64, 8, 1])
def test_a_collision_of_hashes_is_no_match(bits):
    items = [EvaluatedText(str(k), str(k), (text(k),)) for k in range(30)]
    texts = [(str(k), text(k if k < 5 else 1000 + k)) for k in range(30)]
    hits = {(item.id, place) for item, place, _ in Index(items, bits).find(texts)}
    assert hits == {(str(k), str(k)) for k in range(5)}


@pytest.mark.parametrize("size", range(3, 30))
def test_the_length_decides_how_an_item_is_looked_for(size):
    item, before, after = text(1, size), text(2), text(3)
    alone = f"{before}\n{item}?\n{after}"
    assert found(item, item.upper()) and found(item, alone)
    assert found(item, f"{before} {item} {after}") == (size >= 8)
    part = " ".join(item.split()[-13:])
    assert found(item, f"{before} {part} {after}") == (size >= 8)
    assert not found(item, f"{before} {' '.join(part.split()[:12])} {after}") or size in range(
        8, 13
    )


def test_windows_do_not_reach_over_the_ends_of_texts_and_parts():
    item = text(1, 20)
    first, second = " ".join(item.split()[:10]), " ".join(item.split()[10:])
    assert not flag(Index([EvaluatedText("1", "1", (item,))]), [("a", first), ("b", second)])
    long = EvaluatedText("1", "1", (f"{first} {text(4, 3)}", f"{text(5, 3)} {second}"))
    assert not flag(Index([long]), [("a", item)]), "a window over the gap between two parts"


def test_each_kind_is_told_with_its_first_place():
    items = [EvaluatedText("1", "1", (text(1),)), EvaluatedText("2", "2", (text(2),), text(3))]
    matches = flag(
        Index(items),
        [("d", "x"), ("e", text(1)), ("f", text(1))],
        [("p", text(1))],
        [("a", text(3))],
    )
    assert [(m.kind, m.place) for m in matches["1"]] == [("corpus", "e"), ("prompt", "p")]
    assert [(m.kind, m.place) for m in matches["2"]] == [("answer", "a")]
    assert matches["1"][0].phrase in text(1)


SAME = [
    ("It's the café's “naïve” rôle", "ITS THE CAFE\u0301S nai\u0308ve\u00ad rôle"),
    ("ﬁve １２３ Straße", "five 123 STRASSE"),
    ("state-of-the-art, e.g. foo_bar(x)", "State of the art; e g foo bar x"),
    ("co\u00adoperate\u200b now", "cooperate now"),
    ("東京は日本の首都です。", "東 京 は 日本 の 首都 です"),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), SAME)
def test_forms_of_one_text_are_the_same_words(left, right):
    assert words(left) == words(right) and len(words(left)) > 1


CAT = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"


@pytest.mark.parametrize(
    ("item", "document", "reference", "is_found"),
    [
        (text(1), "72", "72", False),
        (text(1), "not enough evidence", "Not enough evidence.", False),
        (text(1), "The answer is:\nparis is the capital", "Paris is the Capital!", True),
        (
            "吾輩は猫である。名前はまだ無い。どこで生れたか。",
            "序文：吾輩は猫である、名前はまだ無い、どこで生れたか、以下略",
            "",
            True,
        ),
        (
            "吾輩は猫である。名前はまだ無い。どこで生れたか。",
            "吾輩は犬である。名前はもうある。",
            "",
            False,
        ),
    ],
)
def test_few_words_are_no_evidence_and_characters_are_words(item, document, reference, is_found):
    assert found(item, document, reference=reference) is is_found


def documents(count: int, first: int = 0) -> list[Document]:
    return [
        Document.make(text(first + k, 60), f"s{k}", {"name": f"n{k}"}, "train")
        for k in range(count)
    ]


@pytest.mark.parametrize("task", ["summary", "api_json", "example", "prose_questions"])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_task_s_template_is_nobody_s_own(task, count):
    known = load_task(task)
    held_out = [ask(known, document) for document in documents(count)]
    trained = [ask(known, document) for document in documents(200, first=5000)]
    items = [contamination.of_item(Item.make(prompt)) for prompt in held_out]
    texts = [(p.id, "\n".join(m.content for m in p.messages)) for p in trained]
    assert flag(Index(items), texts) == {}
    assert Index(items).searchable == items
    again = [(p.id, "\n".join(m.content for m in p.messages)) for p in held_out]
    assert len(flag(Index(items), again)) == count


def test_what_a_user_writes_before_every_question_is_nobody_s_own():
    order = f"You are an examiner. {text(77, 30)} Answer briefly: "
    items = [EvaluatedText(str(k), str(k), (order + text(k, 25),)) for k in range(40)]
    clean = [(str(k), order + text(3000 + k, 25)) for k in range(300)]
    assert flag(Index(items), clean) == {}
    assert set(flag(Index(items), [("p", order + text(7, 25))])) == {"7"}


def test_a_passage_with_several_questions_is_still_an_item_s_own():
    passage = text(50, 60)
    items = [EvaluatedText(f"q{k}", "passage", (passage, text(k, 10))) for k in range(6)]
    items += [EvaluatedText(f"o{k}", f"o{k}", (text(100 + k),)) for k in range(20)]
    assert set(flag(Index(items), [("d", passage)])) == {f"q{k}" for k in range(6)}


def test_names_of_classes_are_nobody_s_own():
    items = [EvaluatedText(str(k), str(k), (text(k),), "the text says nothing") for k in range(10)]
    assert flag(Index(items), [("a", "The text says nothing.")]) == {}
