"""Signals that came with answers: a server's lists become what the local teacher would say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distill.cli import main
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt
from distill.models.loading import load_model, load_tokenizer
from distill.records import Candidate, Document, Message, Pair, Prompt, Response, TokenLogprob
from distill.storage.files import read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.training.soft_labels import server_logprobs
from distill.training.soft_labels.cache import Signal
from tests.support.fake_teacher import FakeTeacher, Reply
from tests.support.tiny import make_tokenizer
from tests.support.training import make_soft_run, pairs, perform
from tests.training.test_capture import captured

SERVED = "tiny-served"
LISTED = {"logprobs": True, "top_logprobs": 20}
KNOWN = [*pairs(9), *pairs(3, first=100)]
Spell = Callable[[Any, int], dict[str, Any]]  # how a server writes a token


def by_bytes(tokenizer: Any, i: int) -> dict[str, Any]:
    """As hosted interfaces do: the text and its bytes, parts of characters too."""
    back = {char: byte for byte, char in bytes_to_unicode().items()}
    word = tokenizer.convert_ids_to_tokens(i)
    special = i in tokenizer.added_tokens_decoder
    data = word.encode() if special else bytes(back[char] for char in word)
    return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}


def by_id(tokenizer: Any, i: int) -> dict[str, Any]:
    """As vLLM does with `return_tokens_as_token_ids`."""
    return {"token": f"token_id:{i}", "bytes": list(b"\xef\xbf\xbd")}


def by_text(tokenizer: Any, i: int) -> dict[str, Any]:
    """As vLLM does otherwise: parts of characters all look alike."""
    return {"token": tokenizer.decode([i])}


class Writer:
    """Answers as the pairs do, and lists what a model in this process predicts at each token."""

    def __init__(self, folder: Path, spell: Spell = by_bytes, ends: int = 1) -> None:
        self.model: Any = load_model(str(folder), "float32")
        self.tokenizer: Any = load_tokenizer(str(folder))
        self.texts = {pair.prompt.messages[-1].content: pair.response.text for pair in KNOWN}
        self.spell, self.ends = spell, ends  # how many tokens of the template's end are listed

    @torch.no_grad()
    def content(self, question: str, k: int) -> list[dict[str, Any]]:
        asked = (Message(role="user", content=question),)
        prompt = encode_prompt(self.tokenizer, asked, "2026-01-01")
        text = f"{self.texts.get(question, 'one two')}<|im_end|>\n"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[: len(ids) - 2 + self.ends]
        logits_NV = self.model(input_ids=torch.tensor([prompt + ids])).logits[0]
        logs_NV = torch.log_softmax(
            logits_NV[len(prompt) - 1 : -1, : len(self.tokenizer)].float(), -1
        )
        return [
            self._one(row, i) | {"top_logprobs": [self._one(row, j) for j in row.topk(k).indices]}
            for row, i in zip(logs_NV, ids, strict=True)
        ]

    def _one(self, row: torch.Tensor, i: Any) -> dict[str, Any]:
        return {**self.spell(self.tokenizer, int(i)), "logprob": float(row[i])}

    def __call__(self, number: int, payload: dict[str, Any]) -> Reply:
        question = payload["messages"][-1]["content"]
        text = self.texts.get(question, "one two")
        message = {"role": "assistant", "content": text}
        lists = {"content": self.content(question, payload["top_logprobs"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": lists}
        return Reply(answer={"choices": [choice]})


def make_answered(folder: Path, url: str, model: str = SERVED, **signals: Any) -> Run:
    """Return a run whose teacher is behind an endpoint, with its prompts."""
    teacher = {"kind": "endpoint", "model": model, "base_url": url, "extra_body": LISTED}
    teacher |= {"initial_backoff": 0.01, "max_retries": 1, "concurrency": 2, "max_new_tokens": 64}
    run = make_soft_run(folder, "far", teacher=teacher, signals={"from_answers": True, **signals})
    documents = [Document.make(f"text {pair.prompt.id}", "x", split="train") for pair in KNOWN]
    write_records(run.path("documents.jsonl"), documents)
    prompts = [
        Prompt.make(messages=pair.prompt.messages, document_id=document.id, task="t")
        for pair, document in zip(KNOWN, documents, strict=True)
    ]
    write_records(run.path("prompts.jsonl"), prompts)
    return run


def generated(run: Run) -> None:
    """Let the teacher answer, and take all answers as the dataset."""
    perform(run, "generate")
    prompts = {prompt.id: prompt for prompt in read_records(run.path("prompts.jsonl"), Prompt)}
    found = read_records(run.path("responses.jsonl"), Response)
    assert all(response.logprobs is None for response in found)  # they stay in the store
    rows = [Pair(prompt=prompts[r.prompt_id], response=r) for r in found]
    write_records(run.path("dataset/train.jsonl"), rows[:9])
    write_records(run.path("dataset/validation.jsonl"), rows[9:])


def near(folder: Path, run: Run, **signals: Any) -> dict[str, Signal]:
    """What the same model says of the same answers when it reads them here."""
    own = make_soft_run(folder, "near", signals=signals)
    for name in ("train", "validation"):
        write_records(
            own.path(f"dataset/{name}.jsonl"), read_records(run.path(f"dataset/{name}.jsonl"), Pair)
        )
    rows, cache = captured(own)
    found = cache.read(list(rows.values()))
    return {name: found[row.example] for name, row in rows.items()}


def far(run: Run) -> dict[str, Signal]:
    rows, cache = captured(run)
    found = cache.read(list(rows.values()))
    return {name: found[row.example] for name, row in rows.items()}


@pytest.mark.parametrize("spell", [by_bytes, by_id, by_text])
def test_what_was_listed_is_what_the_teacher_says_when_it_reads(tmp_path, spell):
    make_soft_run(tmp_path)
    with FakeTeacher(Writer(tmp_path / "teacher", spell)) as server:
        run = make_answered(tmp_path, server.url, p=0.9, k=20)
        generated(run)
        asked = len(server.payloads)
        found = far(run)
    assert asked == len(KNOWN) == len(server.payloads)  # nothing is asked for signals
    shared = lists = 0
    for name, wanted in near(tmp_path, run, p=0.9, k=20).items():
        signal = found[name]
        assert len(signal) == len(wanted)
        if spell is not by_text:
            assert np.abs(signal.tail_mass_N - wanted.tail_mass_N).max() < 1e-5
            assert (signal.counts_N == wanted.counts_N).all()
        for one, other in zip(listed(signal), listed(wanted), strict=True):
            lists += len(other)
            for i in one.keys() & other.keys():
                shared += 1
                assert one[i] == pytest.approx(other[i], abs=0.07)
    assert shared > (0.5 if spell is by_text else 0.99) * lists


def listed(signal: Signal) -> list[dict[int, float]]:
    """Each token's ids with their log-probabilities."""
    parts = signal.split([1] * len(signal))
    return [dict(zip(one.ids_E.tolist(), one.logs().tolist(), strict=True)) for one in parts]


def test_where_the_end_is_not_listed_it_has_its_label_and_the_command_says_so(tmp_path, capsys):
    make_soft_run(tmp_path)
    with FakeTeacher(Writer(tmp_path / "teacher", by_id, ends=0)) as server:
        run = make_answered(tmp_path, server.url)
        generated(run)
        found = far(run)
    for signal in found.values():
        *_, last = signal.split([1] * len(signal))
        assert (
            last.counts_N.tolist() == [1]
            and last.tail_mass_N.tolist() == [0]
            and last.logs() == [0]
        )
    tokens = sum(len(signal) for signal in found.values())
    assert f"12 of {tokens} tokens have no list" in capsys.readouterr().err


def test_a_server_that_lists_nothing_is_found_for_the_price_of_a_short_question(tmp_path, capsys):
    make_soft_run(tmp_path)
    with FakeTeacher() as server:
        run = make_answered(tmp_path, server.url)
        run.path("documents.jsonl").unlink()
        write_json(tmp_path / "c.json", run.config.resolved())
        assert main(("run", str(tmp_path / "c.json"))) == Exit.TEACHER
        assert len(server.payloads) == 1 and not run.path("documents.jsonl").exists()
    told = capsys.readouterr().err
    assert "has no log-probabilities" in told and "top_logprobs: 20" in told


def test_a_server_of_another_tokenizer_is_found_by_the_short_question(tmp_path):
    make_soft_run(tmp_path)

    def foreign(tokenizer: Any, i: int) -> dict[str, Any]:
        return {"token": f"word{i}"}

    with FakeTeacher(Writer(tmp_path / "teacher", foreign)) as server:
        run = make_answered(tmp_path, server.url)
        tokenizer = load_tokenizer(str(tmp_path / "teacher"))
        with pytest.raises(DistillError, match="its tokenizer is another"):
            server_logprobs.probe(run.config, tokenizer)
        generated(run)
        with pytest.raises(DistillError, match="lists candidates at 0 of") as error:
            perform(run, "signals")
    assert error.value.code == Exit.TEACHER and not run.path("signals.json").exists()


def place(
    token: str, data: list[int] | None = None, top: tuple[Candidate, ...] = ()
) -> TokenLogprob:
    return TokenLogprob(
        token=token, logprob=-0.5, bytes=None if data is None else tuple(data), top=top
    )


def test_ids_are_told_by_bytes_and_what_names_none_is_left_over():
    tokenizer: Any = make_tokenizer()
    spelling = server_logprobs.Spelling(tokenizer)
    told = 0
    for i in range(len(tokenizer)):
        assert spelling.id_of(place(f"token_id:{i}")) == i
        text = tokenizer.decode([i])
        if "\ufffd" not in text:
            told += 1
            assert (
                spelling.id_of(place(text)) == spelling.id_of(place("?", list(text.encode()))) == i
            )
    assert told > 128
    raw = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
    one = next(data for data, i in spelling.ids.items() if i == raw[0])
    assert spelling.id_of(place("\ufffd", list(one))) == raw[0]
    assert spelling.id_of(place("\ufffd", [0xEF, 0xBF, 0xBD])) is None
    assert spelling.id_of(place("no such token")) is spelling.id_of(place("x", [300, -1])) is None


def test_a_vocabulary_of_pieces_has_spaces_and_bytes_of_its_own():
    words = {"<unk>": 0, "\u2581the": 1, "the": 2, "<0xE2>": 3, "<0x41>": 4, "A": 5}
    bpe = tokenizers.models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True)
    spelling = server_logprobs.Spelling(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe)))
    assert spelling.id_of(place(" the")) == 1 and spelling.id_of(place("the")) == 2
    assert spelling.id_of(place("\ufffd", [0xE2])) == 3
    assert spelling.id_of(place("A")) == 5  # the piece, not the byte


def test_an_answer_cut_into_other_tokens_keeps_the_lists_of_those_it_shares():
    tokenizer = make_tokenizer()
    spelling = server_logprobs.Spelling(tokenizer)
    ids = tokenizer("plain text with words", add_special_tokens=False)["input_ids"]
    written = [place(f"token_id:{i}") for i in ids]
    other = [written[0], place("token_id:1"), place("token_id:2"), *written[2:]]
    assert sorted(server_logprobs.align(spelling, written, ids)) == list(range(len(ids)))
    assert sorted(server_logprobs.align(spelling, other, ids)) == [0, *range(2, len(ids))]
    thinking = [place(f"token_id:{n}") for n in range(40, 60)]
    assert sorted(server_logprobs.align(spelling, [*thinking, *written], ids)) == list(
        range(len(ids))
    )
