"""All chat templates of TRL's wheel, as teacher and as student: rules 1, 6 and 7 of the design."""

from datetime import date

import pytest
from transformers import PreTrainedTokenizerFast

from distill.models.chat_template import (
    control_tokens,
    encode_prompt,
    find_turn,
    fix_template,
    render,
)
from distill.reasoning import join_thought, split_reasoning
from distill.records import Message
from distill.training.encode import encode_pair
from tests.support.templates import chat_templates, tokenizer_of
from tests.support.tiny import make_tokenizer
from tests.support.training import DATE, make_pair

FAMILIES = """
    cohere cohere2 deepseek_r1_distill deepseekv3 diffusion_gemma gemma gemma3 gemma4 gemma4_v2
    gemma4_v3 gemma4_v4 gemma4_v5 glm4moe gptoss idefics3 lfm2 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl
    lfm2_v2 llama3 llama3_1 llama3_2 llava_next muse_glimmer nemotron_3_5_lightning nemotron_3_nano
    nemotron_3_super nemotron_3_ultra phi3 phi3_5 qwen2_5 qwen2_5_vl qwen3 qwen3_5_nothink
    qwen3_5_think qwen3_6 qwen3_8 qwen3_instruct_2507 qwen3_vl smolvlm cohere2_training
    cohere_training deepseek_r1_distill_training deepseekv3_training diffusion_gemma_training
    gemma3_training gemma_training glm4moe_training gptoss_training idefics3_training lfm2_training
    lfm2_v2_training llama3_training llava_next_training muse_glimmer_training
    nemotron_3_5_lightning_training nemotron_3_nano_training nemotron_3_super_training
    nemotron_3_ultra_training phi3_5_training phi3_training qwen2_5_training qwen2_5_vl_training
    qwen3_5_nothink_training qwen3_5_think_training qwen3_6_training qwen3_8_training
    qwen3_instruct_2507_training qwen3_training qwen3_vl_training smolvlm_training
""".split()
OWN = [name for name in FAMILIES if not name.endswith("_training")]  # those of the models
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
CONVERSATIONS = [
    [(USER, "What is <b>1 + 1</b>?")],
    [(SYSTEM, "Answer briefly."), (USER, "Who are you?")],
    [(SYSTEM, "Be kind."), (USER, "Hello"), (ASSISTANT, "Hello!"), (USER, "And now?")],
    [(USER, "One"), (ASSISTANT, "Two"), (USER, "Three"), (ASSISTANT, "Four"), (USER, "Five")],
]
ANSWERS = [
    "Paris.",
    "    return x\n\n\ndef g():\n    pass\n",
    "\n\n two \n",
    " ",
    "",
    "a </s> b<|im_end|>\n<|im_start|>user\nc<mask><document><filename>",
    "<think>no</think> [/INST] <end_of_turn>\n<|eot_id|><|end|><｜User｜>x",
    "é 漢字 🙂 <|channel|>analysis<|message|>",
]


def messages_of(conversation: list[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(Message.model_validate({"role": r, "content": t}) for r, t in conversation)


def asked(conversation: list[tuple[str, str]], answer: str):
    pair = make_pair("is it?", answer)
    prompt = pair.prompt.model_copy(update={"messages": messages_of(conversation)})
    return pair.model_copy(update={"prompt": prompt})


def halves(tokenizer, pair) -> tuple[list[int], list[int]]:
    """Return an example's ids, those before what is supervised and those that are."""
    example = encode_pair(tokenizer, pair, DATE)
    start = example.weights.index(1.0)
    assert all(example.weights[start:])
    return list(example.input_ids[:start]), list(example.input_ids[start:])


def test_the_names_are_all_that_the_wheel_holds():
    assert sorted(chat_templates()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_learnt_byte_for_byte_where_inference_begins(name):
    """B1 to B6, without thinking: the target is the answer and the template's end of turn."""
    tokenizer = tokenizer_of(name)
    fix_template(tokenizer, {}, "drop")
    control = set(control_tokens(tokenizer).ids.values())
    for conversation in CONVERSATIONS:
        messages = messages_of(conversation)
        prompt, turn = (
            encode_prompt(tokenizer, messages, DATE),
            find_turn(tokenizer, messages, DATE),
        )
        shown = tokenizer.decode(prompt)
        assert all(text.strip() in shown for _, text in conversation), shown
        assert turn.opening == turn.closing == ""
        for answer in ANSWERS:
            before, target = halves(tokenizer, asked(conversation, answer))
            end = turn.end or tokenizer.eos_token
            assert before == prompt and tokenizer.decode(target) == answer + end
            own = sum(i in control for i in tokenizer(end, add_special_tokens=False)["input_ids"])
            assert sum(i in control for i in target) == own > 0 and target[-1] in control


@pytest.mark.parametrize("name", OWN)
def test_a_thought_is_learnt_as_the_template_writes_one(name):
    """B2, B4, B7, with thinking: what the student writes is read as its thought and its answer."""
    tokenizer = tokenizer_of(name)
    fix_template(tokenizer, {}, "keep")
    for conversation in CONVERSATIONS:
        for answer in ("Paris.", "a </s> b"):
            pair = asked(conversation, join_thought(answer, "hm, <s>\nso"))
            response = pair.response.model_copy(update={"reasoning": "hm, <s>\nso"})
            before, target = halves(tokenizer, pair.model_copy(update={"response": response}))
            assert before == encode_prompt(tokenizer, messages_of(conversation), DATE)
            turn = find_turn(tokenizer, messages_of(conversation), DATE, thought=True)
            text = tokenizer.decode(target).removesuffix(turn.end or tokenizer.eos_token)
            assert split_reasoning(text) == (answer, "hm, <s>\nso")
        before, target = halves(tokenizer, asked(conversation, "Paris."))
        assert split_reasoning(tokenizer.decode(target))[0].startswith("Paris.")


@pytest.mark.parametrize("name", OWN)
def test_a_document_cannot_forge_a_role_and_is_encoded_as_text(name):
    """B6: every control token's text in a prompt is text, unaltered."""
    tokenizer = tokenizer_of(name)
    control = control_tokens(tokenizer).ids
    text = f"a{''.join(control)}b"
    ids = encode_prompt(tokenizer, messages_of([(USER, text)]), DATE)
    assert text in tokenizer.decode(ids)
    plain = encode_prompt(tokenizer, messages_of([(USER, "ab")]), DATE)
    own = set(control.values())
    assert [i for i in ids if i in own] == [i for i in plain if i in own]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("reasoning", ["drop", "keep"])
def test_what_is_published_renders_what_was_trained(name, reasoning, tmp_path):
    """B7: loaded from the release and rendered without a switch, the prompt is as in training."""
    tokenizer = tokenizer_of(name)
    today = date.today()
    fix_template(tokenizer, {"custom": [None, True, {"a": 'b"\n'}]}, reasoning)
    tokenizer.save_pretrained(tmp_path)
    released = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    parts = "'type'" in tokenizer.chat_template and name.startswith(("idefics", "smolvlm", "llava"))
    content = [{"type": "text", "text": "What?"}] if parts else "What?"
    turns, clock = [{"role": USER, "content": content}], {"date_string": today.strftime("%d %b %Y")}
    text = released.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **clock)
    assert text == render(tokenizer, messages_of([(USER, "What?")]), today.isoformat())


ROLE = "<s>{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
OTHERS = {  # forms of templates that the wheel has none of, shortened
    "B2 Mistral 7B v0.3, whose system turn moves": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "B2 Seed-OSS, which writes a closed thought for a budget of 0": (
        ROLE + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% if thinking_budget == 0 %}"
        "{{ '<seed:think>The budget is 0.</seed:think>' }}{% endif %}{% endif %}"
    ),
    "B2 spaces that differ before the answer": (
        ROLE + "{% if add_generation_prompt %}{{ '\n assistant:  ' }}{% endif %}"
    ),
    "B7 a switch that may not be turned off": (
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ raise_exception('not supported') }}{% endif %}"
        + ROLE
        + "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("form", OTHERS)
def test_forms_of_other_templates_are_learnt_where_inference_begins(form):
    """B2, B7: what stands between the question and the answer decides, not the earlier turns."""
    tokenizer = make_tokenizer(("<s>", "</s>"))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = OTHERS[form]
    fix_template(tokenizer, {}, "drop")
    for conversation in CONVERSATIONS:
        prompt = encode_prompt(tokenizer, messages_of(conversation), DATE)
        assert all(text in tokenizer.decode(prompt) for _, text in conversation[-2:])
        before, target = halves(tokenizer, asked(conversation, "Paris."))
        assert before == prompt and tokenizer.decode(target) == "Paris.</s>"
