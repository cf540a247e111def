"""Formats of a release: which files it holds, what is made once, and what cannot be made."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.evaluation.measurements import Difference
from distill.models import loading
from distill.publishing import formats
from distill.publishing.formats import modelfile, turns_of
from distill.publishing.parity import FileParity, Parity
from distill.publishing.publish import main
from distill.records import Message, Prompt
from distill.storage.files import sha256_file, write_records
from distill.storage.run_folder import Run
from tests.publishing.test_publish import base_files, hub, make_pair, run, trained
from tests.support.fake_hub import FakeHub
from tests.support.tiny import TEMPLATE, make_tiny

__all__ = ["base_files", "hub", "run", "trained"]  # fixtures
DATE = "2026-01-01"


@pytest.fixture(autouse=True)
def without_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("distill.responders.engines.cache_folder", lambda: tmp_path / "none")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def published(run: Run, *names: str, push: str | None = None, **changes: object) -> Path:
    tree = run.config.resolved()
    tree["publish"] |= {"formats": names or ("adapter", "safetensors"), **changes}
    write_records(run.path("dataset/heldout.jsonl"), [make_pair(n) for n in range(20, 24)])
    run.config = Config.model_validate(tree)
    return main(run, push)


def test_a_format_is_added_later_and_the_rest_is_neither_made_nor_sent_again(
    run: Run, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    release = published(run, "adapter", "safetensors", "gguf-f16", push="me/student")
    full, model = release / "student-F16.gguf", release / "model.safetensors"
    before = {path: (sha256_file(path), path.stat().st_ino) for path in (full, model)}
    assert "parity: not measured: llama.cpp is not installed" in capsys.readouterr().err
    hub.requests.clear()
    names = ("adapter", "safetensors", "gguf-f16", "gguf-q8_0", "ollama")
    release = published(run, *names, push="me/student")
    said = capsys.readouterr().err
    assert "student-F16.gguf: as it was" in said and "formats: Q8_0" in said
    assert {path: (sha256_file(path), path.stat().st_ino) for path in before} == before
    sent = [line for line in hub.requests if line.startswith("PUT /lfs/")]
    assert len(sent) == 1, "the new file alone"
    assert hub.repositories["me/student"].files["student-Q8_0.gguf"].startswith(b"GGUF")
    card = ModelCard.load(release / "README.md").text
    assert "student-Q8_0.gguf: parity: not measured" in card and "not run with Ollama" in card
    assert json.loads((release / "parity.json").read_bytes())["files"][1]["runner"] is None
    full.write_bytes(b"GGUF of somebody else")
    release = published(run, *names, push="me/student")
    assert sha256_file(full) == before[full][0], "made anew, as its hash was another"
    (release / "parity.json").write_text('{"files": 3}')
    capsys.readouterr()
    published(run, *names, push="me/student")
    assert "as it was" not in capsys.readouterr().err, "nothing is taken over on a damaged word"


def test_a_release_may_hold_the_file_of_one_runner_alone(run: Run) -> None:
    release = published(run, "gguf-q8_0")
    assert (release / "tiny-Q8_0.gguf").is_file() and not (release / "adapter").exists()
    assert not list(release.glob("*.safetensors"))
    card = ModelCard.load(release / "README.md").text
    assert "PeftModel" not in card and "AutoModelForCausalLM" not in card
    assert "llama-server --model tiny-Q8_0.gguf" in card


def test_what_cannot_be_made_is_said_before_anything_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DistillError, match=r"llama-quantize: is not installed.*engines.sh llama"):
        published(run, "gguf-q4_k_m")
    disk = SimpleNamespace(free=10_000)
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(DistillError, match=r"are needed, and 10\.0 kB are free") as caught:
        published(run, "gguf-f16", "gguf-q8_0")
    assert caught.value.code == Exit.STATE and "F16" in caught.value.what
    assert not run.path("release").exists()


def test_a_file_that_is_worse_is_a_finding_and_one_that_may_be_is_not() -> None:
    row = FileParity(
        file="m-Q4_K_M.gguf", sha256="0", runner="llama.cpp 1", prompts=60, ids_equal=60,
        metric="checks passed", student=0.8, score=0.6, verdict="inferior", same_answers=20,
        difference=Difference(mean=-0.2, low=-0.3, high=-0.1, n=60, documents=30),
    )  # fmt: skip
    parity = Parity(model_sha256="0", margin=0.05, files=(row,))
    (finding,) = parity.findings()
    assert "is worse than the evaluated student: −20.0 [−30.0,\u00a0−10.0] points" in finding.what
    assert "n = 60" in finding.what and "m-Q4_K_M.gguf" in finding.where
    unsure = row.model_copy(update={"verdict": "undecided"})
    assert not parity.model_copy(update={"files": (unsure,)}).findings()
    assert "cannot tell (n = 60)" in unsure.line() and "60 of 60" in unsure.line()
    broken = FileParity(file="m.gguf", sha256="0", runner="llama.cpp 1", reason="ended")
    (finding,) = parity.model_copy(update={"files": (broken,)}).findings()
    assert "does not work in llama.cpp 1: ended" in finding.what


QWEN = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe \"kind\" {{'{{'}}.<|im_end|>\n"
    "{% endif %}{% for m in messages %}",
    1,
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def go(template: str, messages: list[Message]) -> str:
    """Render a template of ours as Go does: range, if, eq, ne, a variable, quoted texts."""
    output, state = "", {"$before": ""}
    tokens = re.findall(r"\{\{ (.*?) \}\}(?=\{\{|$)", template)
    assert "".join(f"{{{{ {token} }}}}" for token in tokens) == template

    def value(word: str, message: Message | None) -> str:
        if word == ".Role":
            return message.role if message else ""
        return state[word] if word.startswith("$") else json.loads(word)

    def block(at: int, end: int, message: Message | None) -> None:
        nonlocal output
        while at < end:
            token = tokens[at]
            word, _, rest = token.partition(" ")
            if word in ("range", "if"):
                depth, stops = 0, [at]
                for i in range(at, end):
                    kind = tokens[i].partition(" ")[0]
                    depth += kind in ("range", "if")
                    depth -= kind == "end"
                    if depth == 1 and kind == "else":
                        stops.append(i)
                    if depth == 0:
                        stops.append(i)
                        break
                if word == "range":
                    for each in messages:
                        block(at + 1, stops[1], each)
                for begin, stop in pairwise(stops):
                    if word == "range":
                        break
                    test = tokens[begin].removeprefix("else ").removeprefix("if ").split(" ", 2)
                    if test[0] == "else" or (
                        (value(test[1], message) == value(test[2], message)) == (test[0] == "eq")
                    ):
                        block(begin + 1, stop, message)
                        break
                at = stops[-1]
            elif word == ".Content":
                assert message
                output += message.content
            elif word == "$before":
                state[word] = value(rest.split(" ", 1)[1], message)
            else:
                output += value(token, message)
            at += 1

    block(0, len(tokens), None)
    return output


@pytest.mark.parametrize("template", [TEMPLATE, QWEN, NO_SYSTEM])
def test_a_modelfile_s_template_renders_as_the_chat_template_does(
    template: str, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "m")
    tokenizer = loading.load_tokenizer(str(model))
    tokenizer.chat_template = template
    turns = [
        Message(role="user", content="How?\n"),
        Message(role="assistant", content=" So. "),
        Message(role="user", content='Why "<b>"?'),
    ]
    system = Message(role="system", content="Be {{ brief }}.")
    asked = [turns[:1], turns[:3], [system, *turns[:1]], [system, *turns[:3]]]
    prompts = [Prompt.make(tuple(messages), "d", "chat") for messages in asked]
    text = modelfile(model, tokenizer, DATE, "m", prompts)
    assert text.startswith('FROM ./m-Q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text and "num_ctx 2048" in text
    body = text.partition('TEMPLATE """')[2].partition('"""')[0]
    for messages in asked:
        assert go(body, messages) == formats.render(tokenizer, messages, DATE)


def test_a_template_that_has_no_form_for_ollama_is_refused(tmp_path: Path) -> None:
    tokenizer = loading.load_tokenizer(str(make_tiny(tmp_path / "m")))
    tokenizer.chat_template = TEMPLATE.replace(
        "'<|im_start|>'", "'<|im_start|>' + loop.index|string"
    )
    with pytest.raises(DistillError, match="no form for Ollama") as caught:
        turns_of(tokenizer, DATE)
    assert caught.value.code == Exit.PUBLISH and "publish.formats" in caught.value.fix
    tokenizer.chat_template = TEMPLATE.replace("m['content']", "m['content']|replace('b', 'B')")
    prompt = Prompt.make((Message(role="user", content="a b"),), "d", "chat")
    with pytest.raises(DistillError, match="it changes the prompt 'a b'"):
        modelfile(tmp_path / "m", tokenizer, DATE, "m", [prompt])
    shutil.rmtree(tmp_path / "m")
