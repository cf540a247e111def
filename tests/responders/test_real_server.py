"""The endpoint responder against `transformers serve`: two replicas of tiny models."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.config.tree import Config
from distill.errors import Exit
from distill.models.loading import load_tokenizer
from distill.responders.endpoint.budget import attempts
from distill.responders.store import ResponseStore
from distill.training.soft_labels.server_logprobs import probe
from tests.support.engines import TEXTS, Engine, local, served, settings
from tests.support.errors import stops
from tests.support.tiny import TEMPLATE, make_tiny, make_tokenizer

ANSWERED = 'completions HTTP/1.1" 200'  # in a server's log


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tiny models: a plain one, and one that thinks aloud."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny(folder / "tiny", hidden=64, tied=False)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer.save_pretrained(make_tiny(folder / "thinker", "qwen2", tied=False))
    return folder


@pytest.fixture(scope="module")
def servers(models: Path) -> Iterator[tuple[Engine, Engine]]:
    """Yield a server of any model of the folder, and one of the tiny model alone."""
    both = Engine("transformers", models), Engine("transformers", models / "tiny")
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


def test_a_server_answers_as_the_local_teacher_does(servers, models, tmp_path):
    asked = settings(servers[0])
    ours, theirs = local(models / "tiny", tmp_path / "a"), served(asked, tmp_path / "b")
    assert [r.text for r in theirs] == [r.text for r in ours]
    assert [r.stop for r in theirs] == [r.stop for r in ours]
    counts = [(r.usage.input_tokens, r.usage.output_tokens, r.usage.estimated) for r in theirs]
    assert counts == [(r.usage.input_tokens, r.usage.output_tokens, False) for r in ours]
    assert {r.model for r in theirs} == {"tiny"} and len({r.text for r in theirs}) > 6


def test_what_it_thinks_comes_apart_from_its_answer(servers, tmp_path):
    found = served(settings(servers[0], model="thinker"), tmp_path, TEXTS[:2])
    assert {(r.text, r.stop, r.usage.output_tokens) for r in found} == {("", "length", 16)}
    assert all(r.reasoning for r in found)


def test_a_server_that_tells_no_distributions_is_found_by_one_short_text(servers, models, tmp_path):
    config = Config.model_validate(
        {
            "name": "x",
            "runs": tmp_path,
            "corpus": {"source": "python-docs"},
            "teacher": settings(servers[0]),
            "student": {"model": str(models / "tiny")},
            "train": {"loss": {"forward_kl": 1}},
        }
    )
    needs = r"prompt_logprobs.*signals need a server that gives"
    with stops(Exit.TEACHER, needs):
        probe(config, load_tokenizer(config.student.model))


def test_a_replica_that_dies_is_left_out_and_nothing_else_is_asked_twice(servers, models, tmp_path):
    texts = [f"{i}: {text}" for i, text in enumerate(TEXTS * 4)]
    asked, log = settings(servers, concurrency=6), servers[1].log
    before = log.read_text().count(ANSWERED)

    def kill() -> None:
        while log.read_text().count(ANSWERED) < before + 8:
            time.sleep(0.002)
        servers[1].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    found = served(asked, tmp_path / "b", texts)
    killer.join()
    assert {r.stop for r in found} <= {"end", "length"} and len(found) == len(texts)
    assert [r.text for r in found] == [
        r.text for r in local(models / "tiny", tmp_path / "a", texts)
    ]
    with ResponseStore(tmp_path / "b", writable=False) as store:
        told = list(attempts(store, {"tiny": None, "other": None}))
    doubtful = [a for a in told if a.billed == "unknown"]
    assert 0 < len(doubtful) <= 3, "more than what the dead replica had in hand"
    assert [a.billed for a in told].count("yes") == len(texts)
    assert len({a.key.rsplit(".", 1)[0] for a in doubtful}) == len(doubtful)
