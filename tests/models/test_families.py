"""C1: each family of today's small students goes from a file to a release that others load.

A tiny random model of the family is trained (killed in the middle, and resumed to the same bytes),
merged, evaluated and published; the release is opened by plain transformers. Our own ways of
computing are held against plain ones: packed, fused or padded losses and gradients against
transformers and PEFT one sample at a time, answers of a batch against `generate`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from distill.cli import main
from distill.models import loading
from distill.models.registry import read_object, text_config
from distill.records import Message
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.training import adapters
from distill.training.student import make_student
from tests.support.fake_hub import FakeHub, fake_hub, use_hub
from tests.support.families import FAMILIES, make_family
from tests.support.training import equal, examples, gradients, killed_at, plain_step

# What LoRA cannot adapt there, since it is no linear module
LEFT = {
    "qwen3.5": "linear_attn.conv1d",
    "gpt-oss": "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.router",
}
PADDED = {"qwen3.5", "gemma3-text", "gemma3", "phi3", "gpt-oss"}  # in training: windows, state
QUESTIONS = ("Why?", "Is it so that a longer question is answered as a short one is?", "Go on")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {family: make_family(place / family, family) for family in FAMILIES}


@pytest.fixture
def hub(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    with fake_hub() as server:
        for number, folder in enumerate(folders.values()):
            server.add(f"acme/tiny-{number}", {p.name: p.read_bytes() for p in folder.iterdir()})
        use_hub(monkeypatch, server, tmp_path / "hub-cache")
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
        yield server


def write_config(folder: Path, family: str) -> str:
    rows = [
        {"prompt": f"What is {n} and {n * 7 % 10}?", "answer": "yes " * (n % 5 + 1)}
        for n in range(9)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "r",
        "runs": str(folder / "runs"),
        "corpus": {
            "path": str(folder / "rows.jsonl"),
            "near_duplicate_threshold": None,
            "split": {"validation": 1, "heldout": 2},
        },
        "teacher": {"kind": "recorded", "model": "acme/teacher", "license": "Apache-2.0"},
        "student": {"model": f"acme/tiny-{list(FAMILIES).index(family)}", "dtype": "float32"},
        "filters": {"repetition": False},
        "train": {
            **{"bf16": False, "max_steps": 3, "save_steps": 1, "tokens_per_step": 200},
            "lora": {"r": 2, "alpha": 4},
        },
        "evaluation": {"max_new_tokens": 2, "bootstrap_samples": 100},
        "terms": {"basis": "rows of our own"},
        "publish": {"license": "Apache-2.0"},
    }
    (folder / "c.yaml").write_text(json.dumps(tree))
    return str(folder / "c.yaml")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_a_file_to_a_release(
    family: str,
    hub: FakeHub,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, family)
    assert main(["run", path]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().err
    assert ("no adapter on" in shown) == (family in LEFT)
    assert f"no adapter on {LEFT.get(family)}:" in shown or family not in LEFT
    runs = tmp_path / "runs"
    with killed_at(3):
        main(["run", path, "name=broken"])
    assert main(["train", path, "name=broken"]) == 0
    assert "continuing after step 2 of 3" in capsys.readouterr().err
    adapter, resumed = (load_file(runs / n / "adapter" / adapters.WEIGHTS) for n in ("r", "broken"))
    assert equal(adapter, resumed) and any(tensor.any() for tensor in adapter.values())
    assert main(["publish", str(runs / "r"), "--override", "a test"]) == 0, capsys.readouterr().err

    # Elsewhere: plain transformers, of weights and config alone; the answer is that of the adapter
    release, bare = runs / "r/release", tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(release / name, bare / name)
    kind: Any = AutoModelForCausalLM
    model, report = kind.from_pretrained(bare, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    base: Any = loading.load_model(str(folders[family]), "float32")
    tuned = PeftModel.from_pretrained(base, str(runs / "r/adapter")).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(release)
    turns = [{"role": "user", "content": "What is 3 and 1?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    with torch.no_grad():
        made, expected = (m(input_ids=ids, use_cache=False).logits for m in (model.eval(), tuned))
    assert (made - expected).norm() <= 1e-4 * expected.norm()
    config = read_object(release / "config.json")
    assert text_config(config) is config and config["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("family", [f for f, parts in FAMILIES.items() if parts[2]])
def test_the_text_part_is_that_of_the_composite_model(
    family: str, folders: dict[str, Path]
) -> None:
    """It has the logits of the class for pictures and text, given text."""
    kind: Any = AutoModelForImageTextToText
    whole = kind.from_pretrained(folders[family], dtype=torch.float32).eval()
    part: Any = loading.load_model(str(folders[family]), "float32")
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (whole, part)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-5)
    loading.check_model(str(folders[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_plain_transformers(family: str, folders: dict[str, Path]) -> None:
    """Losses and gradients of a batch of ragged samples, two of which share their beginning."""
    model: Any = loading.load_model(str(folders[family]), "float32")
    wrapped = adapters.inject(model, 4, 8, 0.0, "all-linear", 0)
    torch.manual_seed(1)
    for name, parameter in adapters.parameters(wrapped).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    total, expected = plain_step(wrapped)
    wrapped.zero_grad()
    adapters.adapt(wrapped)
    student, _ = make_student(wrapped, fused=True)
    assert student.packing == (family not in PADDED)
    loss = student(student.batch(examples()))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients(wrapped).items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_generate(family: str, folders: dict[str, Path]) -> None:
    """A batch's answers, continuous or padded, are what each prompt alone gets from `generate`."""
    responder = LocalResponder.load(str(folders[family]), "float32", concurrency=2)
    sampling = Sampling(max_new_tokens=24)
    requests = [
        Request(
            key=f"k{n}",
            prompt_id=f"p{n}",
            sample=0,
            messages=(Message(role="user", content=text),),
            sampling=sampling,
        )
        for n, text in enumerate(QUESTIONS)
    ]
    answers = {raw.key: raw.body["ids"] for raw in responder.ask(requests)}
    model: Any = loading.load_model(str(folders[family]), "float32")
    for request in requests:
        ids = torch.tensor([responder._encode(request)])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=sorted(responder.stop_ids),
        )
        assert answers[request.key] == made[0, ids.shape[1] :].tolist()
