"""Signals from a server: as the local teacher's would be, and paid for once."""

import json
import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.config.learning import Signals
from distill.config.tree import Config
from distill.config.yaml_file import load_config
from distill.errors import DistillError, Exit
from distill.models.loading import load_model, load_tokenizer
from distill.records import Document, Message, Prompt
from distill.responders.endpoint.budget import account
from distill.responders.store import ResponseStore
from distill.storage.files import write_json, write_records
from distill.storage.run_folder import Run
from distill.training.soft_labels import labels, server_logprobs
from distill.training.soft_labels.cache import Signal, SignalCache
from tests.planning.test_plan import ROOT, shown
from tests.support.fake_teacher import KEY, PRICE, FakeTeacher, Reply, Script
from tests.support.tiny import make_tiny, make_tokenizer
from tests.support.training import SOFT, make_soft_run, perform
from tests.training.test_capture import captured

SERVED = "tiny-served"


class Scorer:
    """Scores texts with a model in this process, as vLLM answers `prompt_logprobs`."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = load_model(str(folder), "float32")
        self.tokenizer: Any = load_tokenizer(str(folder))
        self.texts = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        self.memory: dict[Any, list[Any]] = {}
        self.most = 64

    @torch.no_grad()
    def lists(self, ids: list[int], k: int) -> list[Any]:
        """Return what the model lists at each token: the top k and the token itself; first None."""
        if (key := (tuple(ids), k)) in self.memory:
            return self.memory[key]
        logits_NV = self.model(input_ids=torch.tensor([ids])).logits[0, :-1, : len(self.texts)]
        logs_NV = torch.log_softmax(logits_NV.float(), -1)
        ranks_NV = logs_NV.argsort(descending=True).argsort() + 1
        rows: list[Any] = [None]
        for n, (top, token) in enumerate(
            zip(logs_NV.topk(k).indices.tolist(), ids[1:], strict=True)
        ):
            logs_V, ranks_V = logs_NV[n].tolist(), ranks_NV[n].tolist()
            rows.append({str(i): self._one(i, logs_V[i], ranks_V[i]) for i in {*top, token}})
        return self.memory.setdefault(key, rows)

    def _one(self, i: int, log: float, rank: int) -> dict[str, Any]:
        return {"logprob": log, "rank": rank, "decoded_token": self.texts[i]}

    def __call__(self, number: int, payload: dict[str, Any]) -> Reply:
        ids, k = payload["prompt"], payload["prompt_logprobs"]
        if k > self.most:
            what = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            )
            return refused(400, what)
        return scored(ids, self.lists(ids, k))


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
    own = {"kind": "endpoint", "model": SERVED, "base_url": server.url, "initial_backoff": 0.01}
    return {**own, "max_retries": 2, "concurrency": 3, **changes}


def make_remote(folder: Path, server: FakeTeacher, name: str = "far", **signals: Any) -> Run:
    """The run of the capture's tests, read by a server."""
    asked = {"endpoint": endpoint(server), "p": 0.9, "k": 12, **signals}
    return make_soft_run(folder, name, signals=asked)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return Scorer(make_soft_run(tmp_path_factory.mktemp("models")).folder.parent.parent / "teacher")


@pytest.fixture
def scorer(scores: Scorer) -> Scorer:
    """What a server says of a text; each test has the same models in a folder of its own."""
    scores.most = 64
    return scores


def test_a_server_s_lists_become_what_the_local_teacher_s_are(tmp_path, scorer):
    rows, near = captured(make_soft_run(tmp_path, signals={"p": 0.9, "k": 40}))
    with FakeTeacher(scorer) as server:
        run = make_remote(tmp_path, server, k=40)
        same, far = captured(run)
    assert same == rows and near.folder != far.folder
    one, other = (cache.read(list(rows.values())) for cache in (near, far))
    for name in one:
        assert np.array_equal(one[name].counts_N, other[name].counts_N)
        assert np.abs(one[name].tail_mass_N - other[name].tail_mass_N).max() < 1e-5
        assert np.abs(one[name].logs() - other[name].logs()).max() < 0.07
        assert (one[name].ids_E == other[name].ids_E).mean() > 0.99  # but for ties
    assert len(server.payloads) == len(labels.read_pairs(run)) == 12
    assert server.payloads[0].keys() == {
        *("model", "prompt", "prompt_logprobs", "max_tokens", "temperature")
    }


def kept_dollars(run: Run) -> Decimal:
    with ResponseStore(run.config.store_folder() / "responses", writable=False) as log:
        return account(log, {SERVED: PRICE}).settled


def failing(run: Run, match: str, code: Exit = Exit.TEACHER) -> None:
    with pytest.raises(DistillError, match=match) as error:
        perform(run, "signals")
    assert error.value.code == code and "\n" not in str(error.value)


def test_the_signals_of_a_server_are_trained_on_as_any_others(tmp_path, scorer):
    with FakeTeacher(scorer) as server:
        run = make_remote(tmp_path, server)
        perform(run, "signals")
    examples = labels.student_view(run)
    soft = labels.load_labels(run, examples, len(scorer.tokenizer))
    targets = soft.targets([e.response_id for e in examples], "cpu")
    assert targets.tail_mass_N.min() >= 0 and torch.isfinite(targets.logprobs_M).all()
    made = json.loads(run.path("signals.json").read_text())["teacher"]
    assert (made["endpoint"], made["served"]) == (server.url, SERVED) and "weights" not in made
    near = make_soft_run(tmp_path, "far")
    with pytest.raises(DistillError, match="another teacher or setting"):
        labels.load_labels(near, examples, len(scorer.tokenizer))


def test_a_server_that_lists_too_few_is_asked_once_and_its_flag_is_named(tmp_path, scorer):
    scorer.most = 10
    with FakeTeacher(scorer) as server:
        run = make_remote(tmp_path, server)
        failing(run, r"Requested prompt logprobs of 12, .* \(start vLLM with --max-logprobs")
        assert len(server.payloads) == 1 and server.bill == 0
        scorer.most = 12
        perform(run, "signals")
    assert len(server.payloads) == 13


@pytest.mark.parametrize("status", [500, 400])
def test_h25_a_server_that_only_fails_ends_the_stage(tmp_path, scorer, status):
    with FakeTeacher(lambda number, payload: refused(status, "no")) as server:
        run = make_remote(tmp_path, server)
        failing(run, f"{status}: no")
        assert len(server.payloads) <= 3 and not run.path("signals.json").exists()


def test_what_broke_off_goes_on_with_what_is_left_and_nothing_is_paid_twice(tmp_path, scorer):
    down = {"now": True}

    def script(number: int, payload: dict[str, Any]) -> Reply:
        broken = down["now"] and number >= 5
        return Reply(manner="reset", billed=False) if broken else scorer(number, payload)

    with FakeTeacher(script) as server:
        run = make_remote(tmp_path, server)
        failing(run, r"answer \w+ has no reply: the connection broke.*and \d others have none")
        paid = dict(server.bills)
        down["now"] = False
        perform(run, "signals")
    assert len(paid) == 5 and all(count == 1 for count in server.bills.values())
    assert len(server.bills) == 12 and all(server.asked[text] == 1 for text in paid)


def test_what_was_paid_for_survives_a_stop_before_the_cache_has_it(tmp_path, scorer, monkeypatch):
    def stop(*words: Any) -> None:
        raise KeyboardInterrupt

    with FakeTeacher(scorer) as server:
        run = make_remote(tmp_path, server)
        with monkeypatch.context() as patch:
            patch.setattr(SignalCache, "append", stop)
            with pytest.raises(KeyboardInterrupt):
                perform(run, "signals")
        assert len(server.payloads) == 1
        perform(run, "signals")
        captured(make_remote(tmp_path, server, "other", p=0.5))  # other lists of the same replies
    assert len(server.payloads) == 12


def test_a_reply_without_distributions_is_found_at_the_first_and_asked_again(tmp_path, scorer):
    script: dict[str, Script] = {"now": lambda number, payload: scored(payload["prompt"], None)}
    with FakeTeacher(lambda *words: script["now"](*words)) as server:
        run = make_remote(tmp_path, server)
        failing(run, r"cannot be used: it holds no prompt_logprobs.*same command asks again")
        assert len(server.payloads) == 1
        script["now"] = scorer
        perform(run, "signals")
    assert len(server.payloads) == 13 and server.bill == kept_dollars(run) > 0


def test_a_server_of_another_tokenizer_is_found_at_the_first(tmp_path, scorer):
    words = [f"word{n}" for n in range(600)]

    def script(number: int, payload: dict[str, Any]) -> Reply:
        _, *places = scorer.lists(payload["prompt"], 5)
        other = [{i: {**o, "decoded_token": words[int(i)]} for i, o in p.items()} for p in places]
        return scored(payload["prompt"], [None, *other])

    with FakeTeacher(script) as server:
        failing(make_remote(tmp_path, server), "its tokenizer is another: id .* is 'word")
    assert len(server.payloads) == 1


def test_a_named_tokenizer_must_be_the_student_s(tmp_path, scorer):
    make_tokenizer(("extra",)).save_pretrained(make_tiny(tmp_path / "foreign"))
    with FakeTeacher(scorer) as server:
        run = make_remote(tmp_path, server, tokenizer=str(tmp_path / "foreign"))
        failing(run, "different tokenizers", Exit.CONFIG)
        captured(make_remote(tmp_path, server, "named", tokenizer=str(tmp_path / "teacher")))
        assert len(server.payloads) == 12


def test_a_key_is_sent_and_never_kept(tmp_path, scorer, monkeypatch, capsys):
    monkeypatch.setenv("READER_KEY", KEY)

    def script(number: int, payload: dict[str, Any]) -> Reply:
        return refused(401, f"no such key: {KEY}") if number == 0 else scorer(number, payload)

    with FakeTeacher(script) as server:
        run = make_remote(tmp_path, server, endpoint=endpoint(server, api_key_env="READER_KEY"))
        failing(run, r"401: no such key: \[key\]")
        assert len(server.payloads) == 1
        perform(run, "signals")
    assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in "".join(capsys.readouterr())


def test_a_budget_holds_for_signals_and_raising_it_goes_on(tmp_path, scorer):
    prices = tmp_path / "prices.json"
    row = {**PRICE.model_dump(mode="json"), "model": SERVED, "date": "2026-11-01"}
    prices.write_text(json.dumps({"tokens": [row]}))

    def limited(server: FakeTeacher, dollars: str) -> Run:
        asked = {"endpoint": endpoint(server, budget_dollars=dollars), "p": 0.9, "k": 12}
        return make_soft_run(tmp_path, "far", signals=asked, evaluation={"prices": str(prices)})

    with FakeTeacher(scorer) as server:
        failing(limited(server, "0.003"), "above the limit of", Exit.BUDGET)
        assert 0 < len(server.payloads) < 12 and server.bill <= Decimal("0.003")
        run = limited(server, "9")
        perform(run, "signals")
    assert len(server.payloads) == 12
    entries = [entry for entry in run.ledger.entries() if entry.stage == "signals"]
    assert sum(e.dollars or 0 for e in entries) == server.bill == kept_dollars(run)
    assert sum(entry.attempts for entry in entries) == 12


def test_the_teacher_that_answers_at_an_address_is_the_one_that_reads(tmp_path, scorer):
    with FakeTeacher(scorer) as server:
        run = make_soft_run(tmp_path, "far", teacher=endpoint(server, extra_body={"seed": 3}))
        captured(run)
    assert len(server.payloads) == 12 and "seed" not in server.payloads[0]
    assert {payload["prompt_logprobs"] for payload in server.payloads} == {64}


FAR = {"kind": "endpoint", "model": "m", "base_url": "https://example.org/v1"}
LISTS = {**FAR, "extra_body": {"logprobs": True, "top_logprobs": 20}}
READ_AGAIN = {"teacher": {"model": "some/teacher"}, "signals": {"endpoint": FAR}}
FROM_ANSWERS = {"teacher": LISTS, "signals": {"from_answers": True}}


@pytest.mark.parametrize(
    ("way", "changes", "message"),
    [
        (READ_AGAIN, {"signals": {"temperatures": [2.0]}}, "temperature 1 only"),
        (READ_AGAIN, {"train": {"loss": {**SOFT, "temperature": 2.0}}}, "temperature 1 only"),
        (READ_AGAIN, {"signals": {"method": "sampled"}}, "temperature 1 only"),
        (READ_AGAIN, {"train": {"loss": {**SOFT, "teacher": "live"}}}, "a local teacher must read"),
        (READ_AGAIN, {"on_policy": {"rounds": 1}}, "a local teacher must read"),
        (READ_AGAIN, {"signals": {"model": "some/model"}}, "either model"),
        (READ_AGAIN, {"signals": {"endpoint": {"kind": "local", "model": "m"}}}, r"endpoint\.kind"),
        (FROM_ANSWERS, {"teacher": {"extra_body": {}}}, r"extra_body: \{logprobs: true"),
        (FROM_ANSWERS, {"signals": {"model": "some/model"}}, "or from_answers is true"),
        (FROM_ANSWERS, {"signals": {"temperatures": [2.0]}}, "temperature 1 only"),
        (FROM_ANSWERS, {"on_policy": {"rounds": 1}}, "a local teacher must read"),
        (
            FROM_ANSWERS,
            {"train": {"loss": SOFT, "self_answers": {}}},
            "adds answers, which a local",
        ),
    ],
)
def test_what_no_server_can_do_is_said_with_the_config(way, changes, message):
    tree = {
        "name": "x",
        "corpus": {"source": "python-docs"},
        "student": {"model": "some/student"},
        "train": {"loss": SOFT},
        **changes,
        **{part: {**way[part], **changes.get(part, {})} for part in way},
    }
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tree)


def test_a_host_whose_terms_forbid_it_is_sent_nothing(tmp_path):
    far = {"kind": "endpoint", "model": "gpt-4o", "base_url": "https://api.openai.com/v1"}
    run = make_soft_run(tmp_path, signals={"endpoint": far}, terms={})
    failing(run, "forbidden by", Exit.TERMS)


def test_a_run_finds_before_it_pays_that_the_server_tells_nothing(tmp_path, scorer, capsys):
    with FakeTeacher(lambda number, payload: refused(404, "no such path")) as server:
        run = make_remote(tmp_path, server)
        write_json(tmp_path / "c.json", run.config.resolved())
        assert main(("run", str(tmp_path / "c.json"))) == Exit.TEACHER
        assert not run.path("stages").exists() and server.paths == ["/v1/completions"]
        server.script = scorer
        for _ in range(2):  # the short text is paid once
            server_logprobs.probe(run.config, scorer.tokenizer)
        assert len(server.payloads) == 2 and "404" in capsys.readouterr().err
        document = Document.make("text", "x", split="train")
        prompt = Prompt.make((Message(role="user", content="why?"),), document.id, "chat")
        write_records(run.path("documents.jsonl"), [document])
        write_records(run.path("prompts.jsonl"), [prompt])
        perform(run, "generate")
        perform(run, "signals")
    local, far = run.ledger.entries()  # each stage's tokens are its own
    assert (local.attempts, far.attempts) == (0, 14) and local.output_tokens > 0
    assert far.input_tokens == sum(len(payload["prompt"]) for payload in server.payloads[1:])


def test_the_plan_says_what_a_server_must_list_and_what_reading_costs(tmp_path):
    prices = tmp_path / "prices.json"
    row = {**PRICE.model_dump(mode="json"), "model": SERVED, "date": "2026-11-01"}
    prices.write_text(json.dumps({"tokens": [row]}))
    far = f"{{kind: endpoint, model: {SERVED}, base_url: 'http://127.0.0.1:9/v1'}}"
    words = [f"corpus.path={ROOT / 'data/gsm8k/sample.jsonl'}", f"evaluation.prices={prices}"]
    words += ["corpus.split={validation: 16, heldout: 32}"]
    words += [f"signals.endpoint={far}", "train.loss={ce: 0.5, forward_kl: 0.5}"]
    told = shown(load_config(ROOT / "configs/gsm8k.yaml", words))
    assert re.search(r"read once by a server, 64 ids a token, \$\d", told)


def place(*chances: float) -> dict[int, float]:
    return {n: math.log(chance) for n, chance in enumerate(chances)}


def test_the_top_ids_that_hold_p_are_listed_and_the_tail_mass_is_what_they_lack():
    settings = Signals(p=0.8, k=3)
    far_off = {**place(0.5, 0.25, 0.1), 9: math.log(1e-4)}  # the text's own, at rank 10
    places = [far_off, place(0.3, 0.3, 0.2, 0.1), place(1 - 1e-9, 2e-9)]
    signal = Signal.from_lists(places, settings, 300)
    assert signal.counts_N.tolist() == [3, 3, 1]
    assert signal.ids_E.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert signal.tail_mass_N == pytest.approx([0.15, 0.2, 1e-9], abs=1e-6)
    assert np.exp(signal.logs()[:3]) == pytest.approx([0.5, 0.25, 0.1], rel=0.04)


def test_ids_that_no_text_has_and_what_cannot_be_are_not_listed():
    odd = {**place(0.5, 0.2), 300: math.log(0.25), 7: -9999.0}
    signal = Signal.from_lists([odd], Signals(p=0.999, k=8), 300)
    assert signal.ids_E.tolist() == [0, 1] and signal.tail_mass_N == pytest.approx([0.3], abs=1e-6)
    over = Signal.from_lists([place(0.6, 0.4000003)], Signals(), 300)
    assert over.tail_mass_N.tolist() == [0]
    with pytest.raises(ValueError, match="--logprobs-mode raw_logprobs"):
        Signal.from_lists([place(0.9, 0.8)], Signals(), 300)


GOOD: list[Any] = [None, {"5": {"logprob": -0.1, "rank": 1, "decoded_token": "a"}}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *((given, "holds no prompt_logprobs") for given in (None, "x", [None, ["5"]])),
        (GOOD[:1], "of 1 tokens, and not of the 2"),
        ([*GOOD, None], "of 3 tokens, and not of the 2"),
        *(([None, row], "of 2 tokens, and not of the 2") for row in (None, {"6": GOOD[1]["5"]})),
        *(
            ([None, row], "prompt_logprobs that can be read")
            for row in (
                *({"5": -0.1}, {"x": GOOD[1]["5"]}, {"5": {"logprob": None}}),
                *({"5": {"logprob": "low"}}, {"5": {"logprob": 3.5}}),
                *({**GOOD[1], "-1": GOOD[1]["5"]}, {**GOOD[1], "99999999": GOOD[1]["5"]}),
            )
        ),
    ],
)
def test_a_reply_that_cannot_be_read_says_why(given, message):
    body = json.dumps({"choices": [{"prompt_logprobs": given}]}).encode()
    with pytest.raises(ValueError, match=message):
        server_logprobs.prompt_logprobs(body, (3, 5))
    for other in (b"", b"{", b"[]", b"{}", b'{"choices": []}', b'{"choices": [1]}'):
        with pytest.raises(ValueError):
            server_logprobs.prompt_logprobs(other, (3, 5))
    whole = json.dumps({"choices": [{"prompt_logprobs": GOOD}]}).encode()
    assert server_logprobs.prompt_logprobs(whole, (3, 5))[1] == {
        5: {"logprob": -0.1, "decoded_token": "a"}
    }
