"""Encoding: the ids, the mask and the end token are exactly those that the template makes."""

from string import ascii_letters
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.errors import DistillError, Exit
from distill.generation.generate import require_turns
from distill.models.chat_template import render
from distill.records import Message
from distill.training.batches import Example
from distill.training.encode import check_template, encode_pair, encode_pairs, show
from tests.support.runs import make_run
from tests.support.templates import chat_templates, tokenizer_of
from tests.support.tiny import SPECIAL, TEMPLATE, make_tiny, make_tokenizer
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


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("answer", ["yes", "    return x\n", " two ", "\n\n  three"])
def test_a_tokenizer_of_pieces_learns_every_space(scheme: Any, answer: str) -> None:
    """B6, C2: what is learnt decodes to the answer, where a prefix is put before a text."""
    tokens = ["<unk>", *SPECIAL, "\n", "\u2581", *"():?+", *ascii_letters]
    letters = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    ends = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "bos_token": SPECIAL[1]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **ends)
    tokenizer.chat_template = TEMPLATE
    example = encode(answer, tokenizer=tokenizer)
    target = [i for i, w in zip(example.input_ids, example.weights, strict=True) if w]
    assert tokenizer.decode(target) == answer + "<|im_end|>"


def test_a_template_that_closes_no_turn_gets_the_tokenizers_end():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert supervised(encode(tokenizer=tokenizer)) == "yes<|im_end|>"


def test_a_system_turn_that_a_template_lacks_is_folded_and_said():
    """B5: into the first user turn; the note is for the reader of plan and card."""
    tokenizer = tokenizer_of("gemma")
    system = (Message(role="system", content="Be brief."), Message(role="user", content="Hm?"))
    notes = check_template(tokenizer, DATE, [system])
    assert len(notes) == 1 and "chat template of gemma: has no system turn" in notes[0]
    assert "user\nBe brief.\n\nHm?<end_of_turn>" in render(tokenizer, system, DATE)
    assert not check_template(tokenizer_of("qwen2_5"), DATE, [system])
    with pytest.raises(DistillError, match="no user turn follows"):
        render(tokenizer, system[:1], DATE)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", "no question, or no answer"),
        ("{{ messages[5].content.x }}", "has no element 5"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "no answer"),
        (TEMPLATE.replace("assistant\n", "assistant\n<judge>"), "otherwise than its"),  # KAT-V1
        (TEMPLATE.replace("m['content']", "m['content'].upper()"), "no question, or no answer"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_named_by_the_look_before_you_buy(template, says):
    """B2, B3: the one function that is called before the first purchase."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/model"
    with pytest.raises(DistillError, match=f"chat template of some/model.*{says}") as error:
        check_template(tokenizer, DATE)
    assert error.value.code == Exit.TRAINING


def test_an_order_of_turns_that_the_student_refuses_stops_before_anything_is_bought(tmp_path):
    """B1: raise_exception on roles, found with the prompts and not at training."""
    folder = make_tiny(tmp_path / "student")
    template = chat_templates()["gemma"]
    (folder / "chat_template.jinja").write_text(template)
    run = make_run(tmp_path, student={"model": str(folder)})
    pair = make_pair("q", "a")
    twice = (*pair.prompt.messages, *pair.prompt.messages)
    require_turns(run, [pair.prompt])
    with pytest.raises(DistillError, match="roles must alternate") as error:
        require_turns(run, [pair.prompt.model_copy(update={"messages": twice})])
    assert error.value.code == Exit.TRAINING and str(folder) in error.value.where


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


def test_a_shown_sample_marks_what_is_supervised(capfd):
    show(make_tokenizer(), [encode(), encode()], count=1)
    shown = capfd.readouterr().err
    assert shown.startswith("first batch: 2 samples; «supervised»")
    assert shown.endswith("assistant\n«yes<|im_end|>»\n") and shown.count("«") == 2
