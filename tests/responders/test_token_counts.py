"""Tokens counted by a cached tokenizer: nothing is fetched."""

from pathlib import Path

import pytest

from distill.models import download
from distill.models.registry import lookup
from distill.records import Message, Usage
from distill.responders.responder import Raw, Request, Sampling
from distill.responders.token_counts import recounted, token_counter
from tests.support.tiny import make_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    token_counter.cache_clear()
    return tmp_path / "cache"


def test_a_served_model_is_counted_by_its_converted_twin(cache: Path) -> None:
    hub = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    row = lookup("qwen2.5-coder-0.5b-instruct")
    assert row and row.gguf and row.hub_id == hub
    folder = download.converted_folder(row.name, row.gguf)
    assert folder.is_relative_to(cache)
    make_tokenizer().save_pretrained(folder)
    for name in (hub, row.name):
        count = token_counter(name)
        assert count and count("hällo") == 6  # bytes


def test_only_estimates_are_counted_again_and_stay_estimates(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "m")
    turns = (Message(role="system", content="abc"), Message(role="user", content="de"))
    request = Request.make("o", "p", turns, Sampling())
    texts = {"text": "four", "reasoning": "why"}
    usage = Usage(input_tokens=9, output_tokens=9)
    failed = Raw.failed(request, "e").response("p")
    told = failed.model_copy(update={**texts, "usage": usage})
    estimate = Usage(input_tokens=9, output_tokens=9, seconds=2, estimated=True)
    guessed = told.model_copy(update={"usage": estimate})
    found = recounted([told, guessed], [request, request], str(tmp_path / "m"))
    assert found[0] == told
    assert found[1].usage == Usage(input_tokens=5, output_tokens=7, seconds=2, estimated=True)
    assert recounted([guessed], [request], "fake-1") == [guessed]
