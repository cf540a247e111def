"""A release's GGUF files in llama.cpp: each is compared with the student that was evaluated."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from distill.config.tree import Config
from distill.errors import Exit
from distill.evaluation.answering import requests_to
from distill.evaluation.scorecard import Scorecard
from distill.models.gguf_file import write_gguf
from distill.publishing.card import Facts, make_card
from distill.publishing.formats import find_quantize, write_files
from distill.publishing.obligations import ReleaseLicense
from distill.publishing.parity import findings, measure
from distill.records import Message, Pair, Prompt
from distill.responders.engines import engine_folder
from distill.responders.local.local_model import LocalResponder
from distill.storage.files import write_json, write_records
from distill.storage.run_folder import Run
from tests.engines.test_gguf import CORPUS, TOKENIZERS, make
from tests.support.asking import answer_all
from tests.support.engines import python_of

LIMIT = 12  # tokens of an answer
ITEMS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of("llama.cpp")
    return make(tmp_path_factory.mktemp("models") / "tiny", TOKENIZERS["gpt-2"]())


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """A run whose student has answered; the teacher said the same."""
    tree = {
        "name": "r", "runs": tmp_path / "runs", "corpus": {"source": "python-docs"},
        "teacher": {"model": str(model), "max_new_tokens": LIMIT}, "student": {"model": str(model)},
    }  # fmt: skip
    run = Run(Config.model_validate(tree))
    texts = [page[60 * n :][:80] for n, page in enumerate((CORPUS * 3)[:ITEMS])]
    prompts = [
        Prompt.make((Message(role="user", content=text),), f"d{n}", "chat")
        for n, text in enumerate(texts)
    ]
    student = LocalResponder.load(str(model), "float32")
    requests = requests_to(student, prompts, [LIMIT] * ITEMS)
    answers = answer_all(student, requests, tmp_path / "store")
    pairs = [Pair(prompt=p, response=a) for p, a in zip(prompts, answers, strict=True)]
    write_records(run.path("dataset/heldout.jsonl"), pairs)
    write_records(run.path("answers/student.jsonl"), answers)
    write_json(run.path("tasks.json"), {})
    return run


def test_each_file_is_measured_against_the_student_once(
    run: Run, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["F16", "Q8_0", "Q4_K_M"]
    if not (engine_folder("llama.cpp") / "bin/llama-quantize").is_file():
        kinds.remove("Q4_K_M")
    files = write_files(model, tmp_path, "m", kinds)
    assert sorted(tmp_path.glob("*.gguf")) == sorted(files)
    full, *others = rows = measure(run, model, files, tmp_path / "none")
    for row in rows:
        assert row.ids_equal == row.prompts == ITEMS and row.reason is None
        assert row.runner and row.runner.startswith("llama.cpp 20")
        assert row.nmse is not None and row.largest_difference is not None
        assert row.difference.n == row.difference.clusters == ITEMS and row.student == 1
    assert full.nmse is not None and full.nmse < 1e-6, "its weights are of float16"
    assert full.largest_difference is not None and full.largest_difference < 0.05
    assert full.same_answers is not None and full.same_answers >= ITEMS - 2
    errors = [row.nmse or 0 for row in rows]
    assert errors == sorted(errors) and others[0].nmse and 1e-7 < others[0].nmse < 1e-2
    tree = run.config.resolved() | {"student": {"model": "smollm2-135m-instruct"}}
    facts = Facts(Config.model_validate(tree), "m", None, ReleaseLicense("MIT", True, False, ""))
    facts = facts._replace(parity=rows)
    card = make_card(facts, Scorecard(name="r")).text
    assert f"| m-F16.gguf | {ITEMS} of {ITEMS} | " in card and "Runner: llama.cpp 20" in card
    assert "%|" not in capsys.readouterr().err, "no bar of a library"
    write_json(tmp_path / "parity.json", [row.model_dump(mode="json") for row in rows])
    assert measure(run, model, files, tmp_path / "parity.json") == rows
    assert "compared" not in capsys.readouterr().err, "nothing has changed"


def test_a_file_of_other_weights_is_worse_and_one_that_is_none_does_not_work(
    run: Run, model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name in (name for name in tensors if "_proj.weight" in name):
        tensors[name] = tensors[name].flip(0).contiguous()  # as a wrong permutation would
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    write_gguf(other, tmp_path / "m-F16.gguf", "F16", "m")
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"GGUF, but for its beginning")
    files = [tmp_path / "m-F16.gguf", tmp_path / "m-Q8_0.gguf"]
    worse, broken = rows = measure(run, model, files, tmp_path / "none")
    assert worse.ids_equal == ITEMS and worse.nmse and worse.nmse > 0.01
    assert worse.largest_difference and worse.largest_difference > 0.5
    assert worse.verdict == "inferior" and broken.reason
    first, second = findings(rows, 0.05)
    assert "is worse than the evaluated student: −" in first.what and f"n = {ITEMS}" in first.what
    assert first.where == "m-F16.gguf" and first.code == Exit.PUBLISH
    unsure = worse.model_copy(update={"verdict": "undecided"})
    assert unsure.conclusion == f"cannot tell (n = {ITEMS})" and not findings([unsure], 0.05)
    assert "does not work in llama.cpp" in second.what
    assert "not measured" in broken.conclusion


def test_what_makes_k_quants_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.copy("/bin/true", tmp_path / "llama-quantize")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert find_quantize() == f"{program}"
