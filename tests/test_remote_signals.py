"""Signals from a server: what it says of a text becomes what the local teacher would have said, and is paid once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.models import load_model, load_tokenizer
from distill.run import Run
from tests.fake_teacher import FakeTeacher, Reply
from tests.test_capture import captured, dataset, make_run

SERVED = "tiny-served"


class Scorer:
    """Scores texts with a model in this process, as vLLM answers `prompt_logprobs`."""

    def __init__(self, folder: Path, most: int = 64) -> None:
        self.model, self.tokenizer = load_model(str(folder), "float32"), load_tokenizer(str(folder))
        self.most = most

    @torch.no_grad()
    def places(self, ids: list[int], k: int) -> list[Any]:
        """What the model lists at each token: the k likeliest and the token itself; nothing at the first."""
        logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1, : len(self.tokenizer)]
        found: list[Any] = [None]
        for row, token in zip(torch.log_softmax(logits.float(), -1), ids[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            listed = [*order[:k], *([] if token in order[:k] else [token])]
            found.append(
                {
                    str(i): {
                        "logprob": row[i].item(),
                        "rank": order.index(i) + 1,
                        "decoded_token": self.tokenizer.decode([i]),
                    }
                    for i in listed
                }
            )
        return found

    def __call__(self, number: int, payload: dict[str, Any]) -> Reply:
        ids, k = payload["prompt"], payload["prompt_logprobs"]
        if k > self.most:
            what = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            )
            return refused(400, what)
        return scored(ids, self.places(ids, k))


def refused(status: int, message: str) -> Reply:
    """A refusal as vLLM words it."""
    body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
    return Reply(status=status, body=json.dumps(body).encode(), billed=False)


def scored(ids: list[int], places: list[Any] | None) -> Reply:
    """A reply that holds `places`."""
    choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
    body = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": SERVED,
        "choices": [{**choice, "prompt_logprobs": places}],
        "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1},
    }
    return Reply(body=json.dumps(body).encode(), billed=True)


def endpoint(server: FakeTeacher, **changes: Any) -> dict[str, Any]:
    own = {"kind": "endpoint", "model": SERVED, "base_url": server.url, "first_wait": 0.01}
    return {**own, "max_retries": 2, "concurrency": 3, **changes}


def make_remote(folder: Path, server: FakeTeacher, name: str = "far", **signals: Any) -> Run:
    """The run of the capture's tests, read by a server."""
    asked = {"endpoint": endpoint(server), "p": 0.9, "k": 40, **signals}
    return make_run(folder, name, signals=asked)


def test_a_server_s_lists_become_what_the_local_teacher_s_are(tmp_path: Path) -> None:
    rows, near = captured(make_run(tmp_path, signals={"p": 0.9, "k": 40}))
    with FakeTeacher(Scorer(tmp_path / "teacher")) as server:
        run = make_remote(tmp_path, server)
        same, far = captured(run)
    assert same == rows and near.folder != far.folder
    one, other = (cache.read(list(rows.values())) for cache in (near, far))
    for name in one:
        assert np.array_equal(one[name].counts_N, other[name].counts_N)
        assert np.abs(one[name].rest_N - other[name].rest_N).max() < 1e-5
        assert np.abs(one[name].logs() - other[name].logs()).max() < 0.07
        assert (one[name].ids_E == other[name].ids_E).mean() > 0.99  # but for ties
    assert len(server.payloads) == len(dataset(run)) == 12
    assert server.payloads[0].keys() == {
        *("model", "prompt", "prompt_logprobs", "max_tokens", "temperature")
    }
