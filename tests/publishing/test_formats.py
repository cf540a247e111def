"""Formats of a release: which files it holds, what is made once, and what cannot be made."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from distill.config.tree import Config
from distill.errors import DistillError, Exit
from distill.models import loading
from distill.publishing import formats
from distill.publishing.formats import modelfile, turns_of
from distill.publishing.publish import main
from distill.records import Message, Prompt
from distill.storage.files import sha256_file, write_records
from distill.storage.run_folder import Run
from tests.publishing.test_publish import base_files, hub, make_pair, run, trained
from tests.support.fake_hub import FakeHub
from tests.support.templates import chat_templates
from tests.support.tiny import TEMPLATE, make_tiny

__all__ = ["base_files", "hub", "run", "trained"]  # fixtures
DATE = "2026-01-01"
GO = shutil.which("go")


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


def test_a_format_is_added_later_and_the_rest_is_not_sent_again(
    run: Run, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    release = published(run, "adapter", "safetensors", "gguf-f16", push="me/student")
    files = [release / "student-F16.gguf", release / "model.safetensors"]
    before = [sha256_file(path) for path in files]
    assert "parity: not measured: llama.cpp is not installed" in capsys.readouterr().err
    hub.requests.clear()
    names = ("adapter", "safetensors", "gguf-f16", "gguf-q8_0", "ollama")
    (release / "parity.json").write_text("[3]")  # damaged, and so not read
    release = published(run, *names, push="me/student")
    assert [sha256_file(path) for path in files] == before
    sent = [line for line in hub.requests if line.startswith("PUT /lfs/")]
    assert len(sent) == 1, "the new file alone"
    assert hub.repositories["me/student"].files["student-Q8_0.gguf"].startswith(b"GGUF")
    card = ModelCard.load(release / "README.md").text
    assert "student-Q8_0.gguf: parity: not measured" in card and "not run with Ollama" in card
    assert json.loads((release / "parity.json").read_bytes())[1]["runner"] is None


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


SMOLLM = (  # SmolLM2's, as its makers publish it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
	var job struct { Template string; Prompts [][]Message }
	json.NewDecoder(os.Stdin).Decode(&job)
	parsed := template.Must(template.New("").Parse(job.Template))
	for _, messages := range job.Prompts {
		err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages})
		if err != nil { panic(err) }
		os.Stdout.Write([]byte{0})
	}
}
"""


def conversations() -> list[list[Message]]:
    """Return 20 prompts: of one to seven turns, with and without a system turn."""
    texts = [
        "How?\n",
        ' So. "<b>"',
        "{{ .Content }}",
        "été 你好 🚀",
        "a\\b\t`c`",
        "<|x|>\r\n",
        "%s",
    ]
    prompts = list[list[Message]]()
    for n in range(20):
        roles = ["system"] * (n % 2) + ["user", "assistant"] * (n % 4) + ["user"]
        prompts.append(
            [
                Message.model_validate({"role": role, "content": f"{texts[(n + k) % 7]}{n}"})
                for k, role in enumerate(roles)
            ]
        )
    return prompts


@pytest.mark.skipif(
    not shutil.which("go"), reason="needs Go's text/template: apt install golang-go"
)
@pytest.mark.parametrize("family", ["qwen2_5", "smollm2", "no system"])
def test_go_renders_a_modelfile_s_template_as_the_chat_template_does(
    family: str, tmp_path: Path
) -> None:
    """Ollama's templates are those of Go's standard library, with these names."""
    model = make_tiny(tmp_path / "m")
    tokenizer = loading.load_tokenizer(str(model))
    own = {"smollm2": SMOLLM, "no system": NO_SYSTEM}
    tokenizer.chat_template = own.get(family) or chat_templates()[family]
    asked = conversations()
    prompts = [Prompt.make(tuple(messages), "d", "chat") for messages in asked]
    text = modelfile(model, tokenizer, DATE, "m", prompts)
    assert text.startswith('FROM ./m-Q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in text and "num_ctx 2048" in text
    (tmp_path / "main.go").write_text(PROGRAM)
    body = text.partition('TEMPLATE """')[2].partition('"""')[0]
    turns = [[m.model_dump() for m in messages] for messages in asked]
    done = subprocess.run(
        [f"{GO}", "run", f"{tmp_path}/main.go"], check=True, capture_output=True,
        input=json.dumps({"Template": body, "Prompts": turns}).encode(),
    )  # fmt: skip
    rendered = done.stdout.decode().split("\0")[:-1]
    assert rendered == [formats.render(tokenizer, messages, DATE) for messages in asked]


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
