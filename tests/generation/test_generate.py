"""Generation: nothing is asked twice, an unfinished plan is rerun, the teacher writes questions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.generation import generate
from distill.generation.generate import requests_of
from distill.pipeline import STAGES
from distill.records import Document, Message, Prompt, Response, Split
from distill.responders.canned import CannedResponder
from distill.responders.responder import Plan, Raw, Request, Sampling
from distill.storage.files import read_records, write_records
from distill.storage.run_folder import Run
from tests.support.asking import answer_all
from tests.support.runs import make_run
from tests.support.tiny import make_tiny

STAGE = next(stage for stage in STAGES if stage.name == "generate")


def asks(count: int, origin: str = "o", **sampling: Any) -> list[Request]:
    return [
        Request.make(
            origin, f"p{i}", (Message(role="user", content=f"q{i}"),), Sampling(**sampling)
        )
        for i in range(count)
    ]


class Counting(CannedResponder):
    """A canned responder that counts what it is asked, and can fail after some answers."""

    def __init__(self, fail_after: int | None = None) -> None:
        super().__init__({}, default="yes")
        self.asked = 0
        self.fail_after = fail_after

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        for raw in super().ask(requests):
            if self.asked == self.fail_after:
                raise DistillError(Exit.TEACHER, "teacher", "gone", "wait")
            self.asked += 1
            yield raw


def test_keys_hold_origin_messages_and_sampling_but_not_the_prompt():
    request = asks(1)[0]
    assert request.key != asks(1, origin="another")[0].key
    system = (Message(role="system", content="s"), *request.messages)
    assert request.key != Request.make("o", "p0", system, Sampling()).key
    for other in (asks(1, temperature=0.5), asks(1, top_p=0.9), asks(1, max_new_tokens=7)):
        assert request.key != other[0].key
    assert Response.make_id(request.key, 0) != Response.make_id(request.key, 1)
    assert request.key == Request.make("o", "another prompt", request.messages, Sampling()).key


class Fussy:
    """A planner whose answers name their plan, as a model's last bits do; it can be cut off."""

    model, origin = "fussy", "o"

    def __init__(self, cut_after: int | None = None) -> None:
        self.cut_after, self.plans = cut_after, list[str]()

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        ordered = sorted(requests, key=lambda r: r.key)
        return [
            Plan(requests=tuple(ordered[i : i + 4]), slots=2) for i in range(0, len(ordered), 4)
        ]

    def fits(self, plan: Plan) -> bool:
        return True

    def ask_plan(self, plan: Plan) -> Iterator[list[Raw]]:
        self.plans.append(plan.id)
        for place, request in enumerate(plan.requests):
            if self.cut_after is not None:
                self.cut_after -= 1
                if self.cut_after < 0:
                    raise KeyboardInterrupt
            body = {"text": f"{place} of {plan.id}"}
            yield [Raw(key=request.key, sample=0, model=self.model, stop="end", body=body)]

    def ask(self, requests: Sequence[Request]) -> Iterator[Raw]:
        for plan in self.plan(requests):
            for group in self.ask_plan(plan):
                yield from group


@pytest.mark.parametrize("cut", [0, 3, 4, 9])
def test_an_unfinished_plan_is_rerun_whole(tmp_path, cut):
    whole = answer_all(Fussy(), asks(10), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        answer_all(Fussy(cut), asks(10), tmp_path / "cut")
    again = Fussy()
    assert answer_all(again, asks(10), tmp_path / "cut") == whole
    assert len(again.plans) == 3 - cut // 4, "finished plans are not run again"


def with_prompts(folder: Path, **teacher: Any) -> tuple[Config, Run]:
    """Return a run with six prompts, one of them held out and one for validation."""
    run = make_run(folder, teacher=teacher, terms={"basis": "weights made by this test"})
    splits: list[Split] = ["train", "train", "train", "train", "validation", "heldout"]
    documents = [
        Document.make(f"text {i}", "x", {"recorded_answer": f"r{i}"}, split)
        for i, split in enumerate(splits)
    ]
    prompts = [
        Prompt.make((Message(role="user", content=f"q{i}"),), d.id, "chat")
        for i, d in enumerate(documents)
    ]
    write_records(run.path("documents.jsonl"), documents)
    write_records(run.path("prompts.jsonl"), prompts)
    return run.config, run


def test_the_stage_asks_n_samples_for_training_only(tmp_path):
    folder = make_tiny(tmp_path / "m", hidden=16)
    _, run = with_prompts(tmp_path, model=str(folder), n=3, temperature=1.0, max_new_tokens=4)
    run.perform(STAGE)
    responses = read_records(run.path("responses.jsonl"), Response)
    assert [r.sample for r in responses] == [0, 1, 2] * 4 + [0, 0]
    assert len({r.id for r in responses}) == 14
    assert run.ledger.entries()[-1].output_tokens == sum(r.usage.output_tokens for r in responses)


def test_a_second_run_loads_no_model(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path / "m", hidden=16)
    _, run = with_prompts(tmp_path, model=str(folder), max_new_tokens=4)
    generate.main(run)
    first = run.path("responses.jsonl").read_bytes()

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("distill.responders.local.local_model.load_model", refuse)
    generate.main(run)
    assert run.path("responses.jsonl").read_bytes() == first


def test_the_teacher_writes_questions(tmp_path, monkeypatch):
    config, run = with_prompts(tmp_path, kind="canned", answers=str(tmp_path / "a.jsonl"))
    questions = {"kinds": ["factual"], "per_document": 2}
    config = Config.model_validate({**config.resolved(), "prompts": {"questions": questions}})
    replies = "1. What is the colour of the sky at noon?\n2. What colour is grass in the spring?"
    teacher = CannedResponder({}, default=replies)
    monkeypatch.setattr(generate, "make_responder", lambda *rest: teacher)
    generate.main(Run(config, run.folder))
    documents = {d.id: d for d in read_records(run.path("documents.jsonl"), Document)}
    prompts = read_records(run.path("questions.jsonl"), Prompt)
    first = prompts[0]
    assert len(prompts) == 12
    assert first.messages[-1].content == "What is the colour of the sky at noon?"
    assert "text 0" in first.asked_of_teacher()[-1].content
    assert documents[first.document_id].split == "train"
    answers = read_records(run.path("responses.jsonl"), Response)
    assert {prompt.id for prompt in prompts} <= {response.prompt_id for response in answers}
    (request,) = requests_of(config.teacher, "o", [first], documents)
    assert request.messages == first.asked_of_teacher()
