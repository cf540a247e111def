"""The local responder answers as `generate` does, token for token, whatever shares the batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt
from distill.models.loading import load_model
from distill.models.registry import record_base
from distill.records import Message
from distill.responders.local import continuous_batching, local_model
from distill.responders.local.continuous_batching import (
    NAME,
    BatchRow,
    ContinuousBatch,
    answer_padded,
    continuous_attention,
)
from distill.responders.local.local_model import LocalResponder, end_of_turn, sample_ids, seeded
from distill.responders.local.packed_linear import PackedLinear, packed
from distill.responders.responder import Request, Sampling
from tests.support.asking import answer_all
from tests.support.templates import tokenizer_of
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import adapted

DATE = "2026-01-01"
BEGINNING = "Say in a few words what this piece of documentation is about: "  # shared by prompts
SHAPE: dict[str, Any] = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "teacher", "qwen2", hidden=64)


def make_requests(origin: str, count: int, sampling: Sampling | None = None) -> list[Request]:
    """Return requests of mixed length, two thirds of which begin alike."""
    texts = [
        (BEGINNING if i % 3 else "") + "words " * (i * 5 % 7) + chr(97 + i) for i in range(count)
    ]
    sampling = sampling or Sampling(max_new_tokens=16)
    return [
        Request.make(origin, f"p{i}", (Message(role="user", content=text),), sampling)
        for i, text in enumerate(texts)
    ]


def generated(model: Any, ids: list[int], limit: int, stop_ids: frozenset[int]) -> list[int]:
    """Return what transformers' own `generate` answers, alone in its batch."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=sorted(stop_ids),
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def greedy(logits: torch.Tensor, rows: Sequence[BatchRow]) -> list[int]:
    return logits.max(dim=-1).indices.tolist()


def streamed(
    model: Any, prompts: list[list[int]], limit: int, size: int, stop: int
) -> list[BatchRow]:
    """Return the rows of prompts that a continuous batch of some rows has answered."""
    rows = [BatchRow(i, list(ids), limit) for i, ids in enumerate(prompts)]
    before = model.config._attn_implementation
    with continuous_attention(model) as streams:
        assert streams and model.config._attn_implementation == NAME
        finished = list(ContinuousBatch(model, rows, size, frozenset({stop}), greedy))
    assert model.config._attn_implementation == before
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert sorted(row.index for group in finished for row in group) == list(range(len(rows)))
    return rows


def uneven_stop(answers: list[list[int]]) -> int:
    """Return the id which, as the end token, would end these answers most differently."""
    ids = sorted({i for answer in answers for i in answer})
    ends = [[a.index(i) if i in a else -1 for a in answers] for i in ids]
    return max(zip(ids, ends, strict=True), key=lambda pair: len(set(pair[1])))[0]


@pytest.mark.parametrize(
    ("family", "slots"), [("llama", 3), ("qwen2", 1), ("qwen2", 3), ("qwen2", 64)]
)
def test_stream_answers_as_generate_does(tmp_path: Path, family: str, slots: int) -> None:
    model = load_model(str(make_tiny(tmp_path, family, hidden=64, tied=False)), "float32")
    tokenizer = make_tokenizer()
    requests = make_requests("o", 14)
    prompts = [encode_prompt(tokenizer, r.messages, DATE) for r in requests]
    free = [generated(model, ids, 16, frozenset({0})) for ids in prompts]
    stop = uneven_stop(free)
    wanted = [generated(model, ids, 16, frozenset({stop})) for ids in prompts]
    assert len({len(answer) for answer in wanted}) > 2, "rows must end at different times"
    rows = streamed(model, prompts, 16, slots, stop)
    assert [row.answer() for row in rows] == wanted
    assert all(row.seconds > 0 for row in rows)


def test_stream_reads_a_shared_beginning_once(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), "float32"), make_tokenizer()
    prompts = [
        encode_prompt(tokenizer, [Message(role="user", content=BEGINNING * 3 + c)], DATE)
        for c in "abcdefgh"
    ]
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].numel())
    )
    with continuous_attention(model):
        read.clear()
        rows = [BatchRow(i, ids, 2) for i, ids in enumerate(prompts)]
        list(ContinuousBatch(model, rows, 8, frozenset(), greedy))
    hook.remove()
    assert sum(read) < 2 * len(prompts[0]) + 8 * 30, "the beginning was computed more than once"


def test_sliding_windows_are_kept() -> None:
    torch.manual_seed(1)
    config = MistralConfig(**SHAPE, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [[(3 * i + j) % 97 for i in range(20 + j)] for j in range(4)]
    wanted = [generated(model, ids, 12, frozenset({99})) for ids in prompts]
    assert [row.answer() for row in streamed(model, prompts, 12, 2, 99)] == wanted


def test_an_architecture_that_does_not_fit_answers_padded() -> None:
    scores: Any = {"attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 1}
    config = Gemma2Config(**SHAPE, head_dim=8, initializer_range=0.5, **scores)
    torch.manual_seed(1)
    eager: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **eager).eval()
    with continuous_attention(model) as streams:
        assert not streams
    assert model.config._attn_implementation == "eager"
    prompts = [[(3 * i + j) % 97 for i in range(5 + 3 * j)] for j in range(5)]
    wanted = [generated(model, ids, 6, frozenset({99})) for ids in prompts]
    rows = [BatchRow(i, list(ids), 6) for i, ids in enumerate(prompts)]
    list(answer_padded(model, rows, 3, frozenset({99}), greedy))
    assert [row.answer() for row in rows] == wanted


def test_packed_layers_multiply_bit_for_bit_alike() -> None:
    torch.manual_seed(0)
    head, layer = torch.nn.Linear(64, 40_000, bias=False), torch.nn.Linear(64, 96)
    model = torch.nn.Sequential(layer, torch.nn.Linear(96, 64), head).to(torch.bfloat16)
    inputs = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain = model(inputs)
        with packed(model):
            again = model(inputs)
    assert torch.equal(plain, again)
    assert model[2] is head


def test_bfloat16_agrees_but_at_near_ties(folder: Path) -> None:
    model, tokenizer = load_model(str(folder), "bfloat16"), make_tokenizer()
    prompts = [encode_prompt(tokenizer, r.messages, DATE) for r in make_requests("o", 8)]
    wanted = [generated(model, ids, 12, frozenset({0})) for ids in prompts]
    for row, other in zip(streamed(model, prompts, 12, 4, 0), wanted, strict=True):
        assert near_tie(model, row.ids[: row.prompt], row.answer(), other)


def near_tie(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Tell whether two answers are equal, or part where the two tokens are within 0.1 nat."""
    pairs = list(zip(ours, theirs, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return True
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1].float()
    chances = logits.log_softmax(-1)
    return abs(float(chances[ours[place]] - chances[theirs[place]])) < 0.1


def test_a_plan_repeats_byte_for_byte(folder: Path) -> None:
    responder = LocalResponder.load(str(folder), "float32", concurrency=3)
    sampling = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=12)
    requests = make_requests(responder.origin, 9, sampling)
    (plan,) = responder.plan(requests)
    assert responder.plan(requests[::-1]) == [plan], "plans depend on the requests, not their order"
    first, second = (
        {r.id: r.model_dump(exclude={"usage"}) for raws in responder.ask_plan(plan) for r in raws}
        for _ in range(2)
    )
    assert first == second


def test_a_sampled_row_does_not_depend_on_its_batch(folder: Path) -> None:
    responder = LocalResponder.load(str(folder), "float32", concurrency=4)
    sampling = Sampling(temperature=0.8, max_new_tokens=10)
    requests = make_requests(responder.origin, 6, sampling)
    together = {r.id: r.reply.text for r in responder.ask(requests)}
    alone = {r.id: r.reply.text for request in requests for r in responder.ask([request])}
    assert together == alone
    assert len(set(together.values())) > 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_says_how_sure_it_is_where_it_is_asked_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, padded: bool
) -> None:
    """The mean is that of a pass over prompt and answer, at temperature 1, the end included."""
    responder = LocalResponder.load(str(folder), "float32", concurrency=3)
    if padded:
        monkeypatch.setattr(continuous_batching, "_agrees", lambda *values: False)
    sampling = Sampling(temperature=temperature, max_new_tokens=9)
    requests = {r.id: r for r in make_requests(responder.origin, 5, sampling)}
    plain = {raw.id: raw for raw in responder.ask([*requests.values()])}
    stop = uneven_stop([raw.body["ids"] for raw in plain.values()])
    responder.stop_ids = frozenset({stop})
    responder.logprobs, stops = True, set[str | None]()
    for raw in [*responder.ask([*requests.values()])]:
        prompt, answer = responder._encode(requests[raw.id]), raw.body["ids"]
        logits = responder.network(input_ids=torch.tensor([prompt + answer])).logits[0]
        logs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        mean = logs.gather(1, torch.tensor(answer)[:, None]).mean().item()
        assert raw.response("p").mean_logprob == pytest.approx(mean, rel=1e-4)
        assert answer == plain[raw.id].body["ids"][: len(answer)]
        stops.add(raw.stop)
    assert "end" in stops
    for raw in plain.values():
        assert "mean_logprob" not in raw.body
        assert "mean_logprob" not in raw.response("p").model_dump_json()


def test_d8_a_prompt_too_long_is_its_own_failure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D8: the others are answered as without it, none is asked twice; above 1 % it is exit 3."""
    responder = LocalResponder.load(str(folder), "float32")
    sampling = Sampling(max_new_tokens=8)

    def too_long(name: str) -> Request:
        turns = (Message(role="user", content="far too long " * 200 + name),)
        return Request.make(responder.origin, name, turns, sampling)

    requests = make_requests(responder.origin, 6, sampling)
    alone = {raw.id: raw.reply.text for raw in responder.ask(requests)}
    both = [*requests[:3], too_long("p7"), *requests[3:]]
    found = answer_all(responder, both, tmp_path)
    assert [r.stop == "error" for r in found] == [n == 3 for n in range(7)]
    assert "too long" in str(found[3].error) and "exceed the 2048" in str(found[3].error)
    assert {r.id: r.text for r in found if r.stop != "error"} == alone
    assert "1 of 7 prompts are too long: prompt p7" in capsys.readouterr().err
    assert answer_all(responder, both, tmp_path, again=True) == found
    plan = responder.plan(both)[0]
    assert plan.requests == (both[3],) and responder.fits(plan)
    with pytest.raises(DistillError, match=r"prompt p8 .*exceed the 2048") as caught:
        responder.plan([*requests, too_long("p8"), too_long("p9")])
    assert caught.value.code == Exit.INPUT


def test_origin_needs_no_weights_and_names_what_shapes_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(local_model, "load_model", refuse)
    origins = {
        LocalResponder.load(str(folder), dtype, date=date).origin
        for dtype in ("float32", "bfloat16")
        for date in ("2026-01-01", "2026-02-01")
    }
    assert len(origins) == 4


def test_an_end_token_ends_and_is_not_shown(folder: Path) -> None:
    responder = LocalResponder.load(str(folder), "float32")
    request = make_requests(responder.origin, 1)[0]
    (free,) = responder.ask([request])
    assert free.stop == "length" and free.usage.output_tokens == 16
    assert free.usage.input_tokens > 10 and free.usage.seconds > 0
    ends = end_of_turn(responder.tokenizer, DATE)
    assert [responder.tokenizer.decode([i]) for i in ends] == ["<|im_end|>"]
    assert ends <= responder.stop_ids
    responder.__dict__["stop_ids"] = frozenset({free.body["ids"][4]})
    (raw,) = responder.ask([request])
    first = free.body["ids"].index(free.body["ids"][4])
    assert raw.stop == "end" and raw.body["ids"] == free.body["ids"][: first + 1]
    assert raw.body["text"] == responder.tokenizer.decode(free.body["ids"][:first])


@pytest.mark.parametrize(
    ("template", "said", "text", "thought"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nParis.", "Paris.", "hm"),
        ("deepseek_r1_distill", "hm\n</think>\n\nParis.", "Paris.", "hm"),
        ("deepseek_r1_distill", "hm, so", "", "hm, so"),  # cut off
        (
            "gptoss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>P.",
            "P.",
            "hm",
        ),
        ("cohere2", "Paris.<|END_RESPONSE|>", "Paris.", None),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_thought_is_told_from_its_answer(
    folder: Path, template: str, said: str, text: str, thought: str | None
) -> None:
    """B4, B7: also where its marks are special tokens, or the first stands in the prompt."""
    responder = LocalResponder.load(str(folder), "float32")
    responder.tokenizer = tokenizer_of(template)
    request = make_requests(responder.origin, 1)[0]
    row = BatchRow(0, [1, 2], 99)
    row.ids += responder.tokenizer(said, add_special_tokens=False)["input_ids"]
    response = responder._raw(request, row).response("p")
    assert (response.text, response.reasoning) == (text, thought)


def test_variables_of_the_template_shape_a_local_answer(folder: Path) -> None:
    """B7: they are rendered, and part of the origin only where they are set."""
    plain = LocalResponder.load(str(folder), "float32")
    assert plain.origin == LocalResponder.load(str(folder), "float32", template={}).origin
    loud = LocalResponder.load(str(folder), "float32", template={"add": 1})
    assert loud.origin != plain.origin


@pytest.mark.parametrize(
    ("top_p", "shares"), [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0.0, 0.0])]
)
def test_samples_follow_the_distribution(top_p: float, shares: list[float]) -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    ids = sample_ids(logits, 1.0, top_p, [seeded("k", i) for i in range(4000)])
    counts = torch.tensor(ids).bincount(minlength=4) / 4000
    assert torch.allclose(counts, torch.tensor(shares), atol=0.03)


def test_top_p_reaches_beyond_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (-0.01 * torch.arange(50)).repeat(200, 1)
    wide = sample_ids(logits, 1.0, 0.9, [seeded("k", i) for i in range(200)])
    monkeypatch.setattr(local_model, "TOP_IDS", 4)
    assert sample_ids(logits, 1.0, 0.9, [seeded("k", i) for i in range(200)]) == wide
    assert max(wide) > 4


def test_a_merged_adapter_answers_as_the_adapter_does(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    model.save_pretrained(tmp_path)
    record_base(tmp_path, str(folder))
    merged = LocalResponder.load(str(folder), "float32", adapter=tmp_path)
    unmerged = LocalResponder(model.eval().get_base_model(), make_tokenizer(), "student", "o", DATE)
    requests = make_requests("o", 5)
    answers = {r.id: r.reply.text for r in merged.ask(requests)}
    assert answers == {r.id: r.reply.text for r in unmerged.ask(requests)}
    assert merged.origin != LocalResponder.load(str(folder), "float32").origin
    plain = LocalResponder.load(str(folder), "float32").ask(requests)
    assert answers != {r.id: r.reply.text for r in plain}
