"""Marks of reasoning, as the usual families write them: D3."""

import pytest

from distill.reasoning import ANSWERS, PAIRS, SENTENCES, marked, split_reasoning

THOUGHT = "Okay, the user asks for a city.\nIs it Paris?"


@pytest.mark.parametrize(("opening", "closing"), [*PAIRS, *SENTENCES])
def test_d3_a_thought_is_split_off(opening, closing):
    for text in (
        f"{opening}{THOUGHT}{closing}Paris. ",
        f"\n{opening}\n{THOUGHT}\n{closing}\n\nParis. ",
        f"{opening}{closing}\n{opening}{THOUGHT}{closing} Paris. ",
    ):
        assert split_reasoning(text) == ("Paris. ", THOUGHT)


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_d3_the_opening_mark_may_stand_in_the_prompt(opening, closing):
    """D3: the template opened the thought; also where it never ends, being cut off."""
    assert split_reasoning(f"{THOUGHT}\n{closing}\n\nParis.") == ("Paris.", THOUGHT)
    assert split_reasoning(f"\n{closing}\n\nParis.") == ("Paris.", "")
    assert split_reasoning(f"{THOUGHT}\n{closing}") == ("", THOUGHT)
    assert split_reasoning(f"{opening}\n{THOUGHT}") == ("", THOUGHT)


@pytest.mark.parametrize(("opening", "closing"), ANSWERS)
def test_d3_marks_around_the_answer_go_too(opening, closing):
    assert split_reasoning(f"<think>a</think>\n{opening}\nParis.\n{closing}\n") == ("Paris.", "a")
    assert split_reasoning(f"<think>a</think>{opening}\nPar") == (
        "Par" if opening else "\nPar".lstrip(),
        "a",
    )
    text = f"{opening}Paris.{closing}"
    assert split_reasoning(text) == (text, None), "there was no thought"


def test_d3_gpt_oss_answers_in_channels():
    text = (
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
        "<|channel|>final<|message|>Paris.<|return|>"
    )
    assert split_reasoning(text) == ("Paris.", THOUGHT)


@pytest.mark.parametrize(
    "text",
    [
        "    return x\n\n",
        "say <think>",
        "The tag `</think>` ends a thought.",
        'It ends with "</think>", as ever.',
        "DeepSeek closes its thought with </think> before it answers.",
        "Each thought ends with [/THINK], as in Magistral.",
        "It is closed by </think>.",
        "用 </think> 来结束",
        "```xml\n<a>\n</think>\n```\nThat is all.",
        "<a><think>b</think></a>",
        "Here is my response: Paris.",
        "Here is my thought process: first this.",
        "I think, therefore I am.",
        "",
    ],
)
def test_d3_what_only_speaks_of_marks_is_left_alone(text):
    assert split_reasoning(text) == (text, None)


def test_d3_the_first_mark_that_is_none_in_quotes_ends_a_thought():
    quoted = 'They ask what "</think>" does.'
    assert split_reasoning(f"{quoted}\n</think>\n\nIt ends `</think>`.") == (
        "It ends `</think>`.",
        quoted,
    )
    for ended in ("Say Paris </think> Paris.", "Okay.</think>paris", "Okay so </think>\nparis"):
        thought, _, answer = ended.partition("</think>")
        assert split_reasoning(ended) == (answer.strip(), thought.strip())
    assert split_reasoning("a</think>b</think>c") == ("b</think>c", "a")


def test_d3_a_lone_mark_that_is_left_is_seen():
    assert marked("Sure!\n<think>a") and marked("b</think>c")
    assert not marked("It ends `</think>`.") and not marked("Paris.")
