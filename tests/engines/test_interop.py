"""E1: a release is opened by the runners that people use, and answers there as it was scored."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cli import main
from distill.config.learning import Student
from distill.storage.run_folder import open_run
from distill.training.adapters import write_merged
from scripts import interop
from tests.engines.test_gguf import CORPUS, TOKENIZERS, make
from tests.support.engines import python_of
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.families import FAMILIES, make_family
from tests.support.tiny import make_adapter

COUNT, NEW = 4, {"qwen3.5", "ministral3"}  # what transformers 4.57 has no class for
OLDER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
for place in sys.argv[1:]:
    kind = AutoModelForCausalLM
    model, info = kind.from_pretrained(place, dtype="auto", output_loading_info=True)
    assert model.dtype == torch.float32 and not any(info.values()), (place, info)
    assert AutoTokenizer.from_pretrained(place).chat_template
    with torch.inference_mode():
        torch.save(model(torch.arange(3, 43)[None]).logits, Path(place, "older.pt"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("interop")
    base = make(place / "base", TOKENIZERS["gpt-2"]())
    rows = [{"prompt": f"What is {n} and {n * 7}?", "answer": "yes " * (n % 5 + 1)}
            for n in range(12)]  # fmt: skip
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "r",
        "runs": str(place / "runs"),
        "corpus": {"path": str(place / "rows.jsonl"), "near_duplicate_threshold": None,
                   "split": {"validation": 1, "heldout": COUNT}},
        "teacher": {"kind": "recorded", "model": "acme/teacher", "license": "Apache-2.0"},
        "student": {"model": "acme/tiny", "dtype": "float32"},
        "filters": {"repetition": False},
        "train": {"bf16": False, "max_steps": 3, "learning_rate": 0.1, "lora": {"r": 2}},
        "evaluation": {"max_new_tokens": 12, "bootstrap_samples": 100},
        "terms": {"basis": "rows of our own"},
        "publish": {"license": "Apache-2.0"},
    }  # fmt: skip
    (place / "c.yaml").write_text(json.dumps(tree))
    with pytest.MonkeyPatch.context() as patch, fake_hub() as server:
        server.add("acme/tiny", {p.name: p.read_bytes() for p in base.iterdir()})
        use_hub(patch, server, place / "hub-cache")
        assert main(["run", str(place / "c.yaml")]) == 0
        assert main(["publish", str(place / "runs/r"), "--override", "a test"]) == 0
        yield place / "runs/r"


@pytest.mark.parametrize(
    "name", ["transformers", "transformers4", "peft", "llama.cpp", "lm-eval", "mlx"]
)
def test_a_release_answers_as_it_was_scored(
    name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python_of(name if name in ("transformers4", "llama.cpp", "mlx") else "transformers")
    if name == "lm-eval":
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    code = interop.main(open_run(run), COUNT, "float32", [name])
    shown = capsys.readouterr().out
    row = [cell.strip() for cell in shown.splitlines()[2].strip("|").split("|")]
    alike = [f"{k} of {COUNT}" for k in (COUNT, COUNT - 1)]  # float16 may round a tie otherwise
    assert code == 0 and row[2] == "yes" and row[4] == alike[0], shown
    assert row[3] in (alike if name == "llama.cpp" else alike[:1]), shown


def test_its_tokenizer_file_alone_is_the_tokenizer_that_was_trained_with(run: Path) -> None:
    """The base's says to cut words otherwise than transformers 5 does for a Qwen 2."""
    release, tokenizer = run / "release", AutoTokenizer.from_pretrained(run / "release")
    alone, page = Tokenizer.from_file(str(release / "tokenizer.json")), CORPUS[0][:5000]
    assert alone.encode(page).ids == tokenizer(page).input_ids
    assert alone.encode(page).ids != TOKENIZERS["gpt-2"]().encode(page).ids


def test_another_model_breaks_the_rules(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose head names the next token: other answers, with the gap of our first two tokens."""
    other, ask = shutil.copytree(run / "release", tmp_path / "other"), interop.by_library
    tensors = load_file(other / "model.safetensors")
    for name in tensors.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        tensors[name] = tensors[name].roll(1, 0)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(
        interop, "by_library", lambda name, job, a: ask(name, job._replace(release=other), a)
    )
    assert interop.main(open_run(run), COUNT, "float32", ["transformers"]) == 1
    shown = capsys.readouterr().out
    assert "BROKEN transformers" in shown and "answers differ; 0 may" in shown


def test_each_family_computes_the_same_in_transformers_4(tmp_path: Path) -> None:
    python, folders = python_of("transformers4"), list[Path]()
    for family in sorted(FAMILIES.keys() - NEW):
        base, merged = make_family(tmp_path / family, family), tmp_path / f"{family}-merged"
        make_adapter(tmp_path / "adapter", str(base), 0.1)
        write_merged(Student(model=str(base)), tmp_path / "adapter", merged)
        folders.append(merged)
    line = [python, "-c", OLDER, *map(str, folders)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            ours = model(torch.arange(3, 43)[None]).logits
        assert torch.allclose(ours, torch.load(folder / "older.pt"), atol=1e-5), folder.name
