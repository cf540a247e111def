"""Encoding: the ids, the mask and the end token are exactly those that the template makes."""

from typing import Any

import pytest

from distill.errors import DistillError, Exit
from distill.training.batches import Example
from distill.training.encode import encode_pair, encode_pairs, marked
from tests.support.tiny import make_tokenizer
from tests.support.training import DATE, make_pair


def encode(answer: str = "yes", stop: str = "end", tokenizer: Any = None) -> Example:
    return encode_pair(tokenizer or make_tokenizer(), make_pair("is it?", answer, stop), DATE)


def supervised(example: Example) -> str:
    tokens = zip(example.input_ids, example.weights, strict=True)
    text = make_tokenizer().decode([token for token, weight in tokens if weight])
    assert isinstance(text, str)
    return text


def test_the_answer_and_its_end_token_are_supervised_and_nothing_else():
    example = encode()
    text = make_tokenizer().decode(list(example.input_ids))
    assert text == "<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    assert supervised(example) == "yes<|im_end|>"
    assert example.weights == (0.0,) * (len(example.input_ids) - 4) + (1.0,) * 4


def test_the_end_is_supervised_where_pad_is_the_same_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert supervised(encode(tokenizer=tokenizer)).endswith("<|im_end|>")


def test_a_cut_off_answer_teaches_no_end_and_an_empty_one_nothing_else():
    assert supervised(encode(stop="length")) == "yes"
    assert supervised(encode("")) == "<|im_end|>"
    with pytest.raises(DistillError, match="no token to learn"):
        encode("", stop="length")


def test_special_tokens_in_an_answer_are_plain_text():
    ids = encode("a<|im_end|>\n<|im_start|>user\nb").input_ids
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert sum(i == end for i in ids) == 2  # the user's turn, the answer


def test_a_template_that_closes_no_turn_gets_the_tokenizers_end():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert supervised(encode(tokenizer=tokenizer)) == "yes<|im_end|>"


def test_a_template_whose_conversation_does_not_begin_with_its_prompt_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}A{% endif %}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DistillError, match=r"chat template of .*otherwise than its") as error:
        encode(tokenizer=tokenizer)
    assert error.value.code == Exit.TRAINING


def test_long_samples_are_dropped_counted_and_named_and_none_left_stops(capfd):
    tokenizer, short, long = (
        make_tokenizer(),
        make_pair("is it?", "yes"),
        make_pair("is it", "y" * 500),
    )
    assert len(encode_pairs(tokenizer, [short, long], DATE, 200, "x")) == 1
    shown = capfd.readouterr().err
    assert "dropped 1 samples longer than 200 tokens" in shown and long.response.id in shown
    with pytest.raises(DistillError, match="none of 1 samples") as error:
        encode_pairs(tokenizer, [short], DATE, 5, "train.jsonl")
    assert error.value.code == Exit.TRAINING


def test_a_shown_sample_marks_what_is_supervised():
    text = marked(make_tokenizer(), encode()).plain
    assert text.endswith("assistant\n«yes<|im_end|>»") and text.count("«") == 1
