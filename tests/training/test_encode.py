"""Encoding: the ids, the mask and the end token are exactly those that the template makes."""

import pytest

from distill.errors import DistillError, Exit
from distill.records import Message, Pair, Prompt, Response
from distill.training.encode import encode_pair, encode_pairs, marked
from tests.support.tiny import make_tokenizer

DATE = "2026-01-01"


def pair(answer: str = "yes", stop: str = "end", question: str = "is it?") -> Pair:
    messages = (Message(role="user", content=question),)
    prompt = Prompt.make(messages=messages, document_id="d", task="t")
    response = Response(
        id=Response.make_id(answer + question, 0),
        request_key="k",
        sample=0,
        prompt_id=prompt.id,
        model="m",
        text=answer,
        stop=stop,  # pyright: ignore[reportArgumentType]
    )
    return Pair(prompt=prompt, response=response)


def supervised(tokenizer, example) -> str:
    return tokenizer.decode(
        [t for t, w in zip(example.input_ids, example.weights, strict=True) if w]
    )


def test_the_answer_and_its_end_token_are_supervised_and_nothing_else():
    tokenizer = make_tokenizer()
    example = encode_pair(tokenizer, pair(), DATE)
    text = tokenizer.decode(list(example.input_ids))
    assert text == "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert supervised(tokenizer, example) == "yes<|im_end|>"
    assert example.weights == (0.0,) * (len(example.input_ids) - 4) + (1.0,) * 4


def test_the_end_is_supervised_where_pad_is_the_same_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert supervised(tokenizer, encode_pair(tokenizer, pair(), DATE)).endswith("<|im_end|>")


def test_an_answer_that_was_cut_off_teaches_no_end():
    tokenizer = make_tokenizer()
    assert supervised(tokenizer, encode_pair(tokenizer, pair(stop="length"), DATE)) == "yes"


def test_an_empty_answer_teaches_the_end_only():
    tokenizer = make_tokenizer()
    assert supervised(tokenizer, encode_pair(tokenizer, pair(answer=""), DATE)) == "<|im_end|>"


def test_special_tokens_in_an_answer_are_plain_text():
    tokenizer = make_tokenizer()
    example = encode_pair(tokenizer, pair(answer="a<|im_end|>\n<|im_start|>user\nb"), DATE)
    assert list(example.input_ids).count(tokenizer.eos_token_id) == 2  # the user's turn, the answer


def test_a_template_that_closes_no_turn_gets_the_tokenizers_end():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert supervised(tokenizer, encode_pair(tokenizer, pair(), DATE)) == "yes <|im_end|>"


def test_a_template_whose_conversation_does_not_begin_with_its_prompt_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}A{% endif %}{{ messages[-1]['content'] }}<|im_end|>"
    )
    with pytest.raises(DistillError, match=r"chat template of .*does not begin") as fault:
        encode_pair(tokenizer, pair(), DATE)
    assert fault.value.code == Exit.TRAINING


def test_a_sample_without_a_supervised_token_is_named():
    with pytest.raises(DistillError, match="no token to learn"):
        encode_pair(make_tokenizer(), pair(answer="", stop="length"), DATE)


def test_long_samples_are_dropped_counted_and_named(capfd):
    tokenizer = make_tokenizer()
    short, long = pair(), pair(answer="y" * 500)
    assert len(encode_pairs(tokenizer, [short, long], DATE, 200, "x")) == 1
    shown = capfd.readouterr().err
    assert "dropped 1 samples longer than 200 tokens" in shown and long.response.id in shown


def test_no_sample_left_stops():
    with pytest.raises(DistillError, match="none of 1 samples") as fault:
        encode_pairs(make_tokenizer(), [pair()], DATE, 5, "train.jsonl")
    assert fault.value.code == Exit.TRAINING


def test_a_shown_sample_marks_what_is_supervised():
    tokenizer = make_tokenizer()
    text = marked(tokenizer, encode_pair(tokenizer, pair(), DATE)).plain
    assert text.endswith("assistant\n«yes<|im_end|>»") and text.count("«") == 1
