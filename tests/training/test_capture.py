"""The teacher's reading of the dataset: each token's own distribution, under the teacher's prompt, and nothing twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.config import Config
from distill.config_file import load_config
from distill.errors import DistillError, Exit
from distill.models.chat_template import encode_prompt
from distill.models.loading import load_model, load_tokenizer
from distill.records import Message, Pair
from distill.storage.files import read_records, write_json, write_records
from distill.storage.run_folder import Run
from distill.training.soft_labels import cache as signal_cache
from distill.training.soft_labels import capture
from distill.training.soft_labels.cache import SignalCache, SignalKey
from tests.support.tiny import SPECIAL, TEMPLATE, make_tiny, make_tokenizer
from tests.training.test_train import pairs

SOFT = {"ce": 0.5, "forward_kl": 0.5}


def sharpen(folder: Path) -> None:
    """Scale a tiny model's weights, so that its distributions are peaked and hang on what came before."""
    path = folder / "model.safetensors"
    tensors = {name: t * (1 if t.dim() == 1 else 12) for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def make_run(folder: Path, name: str = "run", **changes) -> Run:
    """A run with a dataset of 12 pairs, of a tiny teacher and a tinier student that share a tokenizer."""
    if not (folder / "teacher").exists():
        make_tiny(folder / "teacher", "qwen2", seed=1, hidden=48)
        sharpen(folder / "teacher")
        make_tiny(folder / "model")
    tree = {
        "name": name,
        "runs": folder / "runs",
        "corpus": {"source": "python-docs"},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "terms": {"basis": "a model of our own"},
        "student": {"model": str(folder / "model")},
        "train": {"loss": SOFT},
        **changes,
    }
    run = Run(Config.model_validate(tree))
    if not run.path("dataset/train.jsonl").exists():
        write_records(run.path("dataset/train.jsonl"), pairs(9))
        write_records(run.path("dataset/validation.jsonl"), pairs(3, first=100))
    return run


def dataset(run: Run) -> list[Pair]:
    names = ("train", "validation")
    return [p for name in names for p in read_records(run.path(f"dataset/{name}.jsonl"), Pair)]


def captured(run: Run) -> tuple[dict[str, SignalKey], SignalCache]:
    """Do the stage, and return the rows by answer, and the cache."""
    capture.main(run.config, run)
    made = json.loads(run.path("signals.json").read_text())
    rows = {name: SignalKey(*row) for name, row in made["rows"].items()}
    return rows, SignalCache.open(run.config.store_folder(), made["cache"])


@torch.no_grad()
def exact(run: Run, pair: Pair, more: int = 0) -> torch.Tensor:
    """The teacher's log-probabilities (N, V) for each token of the answer and its end, read alone; of `more` ids than the
    tokenizer has."""
    model = load_model(run.config.teacher.model, "float32")
    tokenizer = load_tokenizer(run.config.teacher.model)
    prompt = encode_prompt(tokenizer, pair.prompt.asked_of_teacher(), run.config.template_date)
    text = f"{pair.response.text}<|im_end|>\n"
    answer = tokenizer(text, add_special_tokens=False)["input_ids"][:-1]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    own = logits[len(prompt) - 1 : -1, : len(tokenizer) + more]
    return torch.log_softmax(own.double(), -1)


def test_each_token_has_the_teacher_s_distribution_where_it_is_predicted(tmp_path):
    run = make_run(tmp_path, signals={"p": 0.9, "k": 40, "temperatures": [2.0]})
    rows, cache = captured(run)
    found = cache.read(list(rows.values()))
    for pair in dataset(run):
        wanted = exact(run, pair)
        signal = found[rows[pair.response.id].example]
        assert len(signal) == len(wanted) == rows[pair.response.id].count
        ends = np.cumsum(signal.counts_N, dtype=int)
        for place, (end, count) in enumerate(zip(ends, signal.counts_N, strict=True)):
            ids = torch.tensor(signal.ids_E[end - count : end].astype(np.int64))
            likeliest = wanted[place].topk(int(count)).values
            assert (wanted[place][ids] - likeliest).abs().max() < 1e-4  # the same, but for ties
            mass = wanted[place][ids].exp().sum().item()
            assert signal.tail_mass_N[place] == pytest.approx(1 - mass, abs=1e-5)
            last = wanted[place][ids[-1]].exp().item()
            assert count == 40 or mass > 0.9 - 1e-5 > mass - last - 2e-5
            logs = torch.tensor(signal.logs()[end - count : end])
            assert (logs - wanted[place][ids]).abs().max() < 1 / 16
            others = wanted[place].clone()
            others[ids] = float("-inf")
            tail = torch.logsumexp(others / 2.0, 0).item()
            assert signal.tails_TN[0, place] == pytest.approx(tail, abs=1e-4)


def test_the_teacher_reads_the_prompt_that_it_was_asked(tmp_path):
    run = make_run(tmp_path)
    shown = (Message(role="system", content="a passage"), Message(role="user", content="why?"))
    first, *others = dataset(run)
    prompt = first.prompt.model_copy(update={"teacher_messages": shown})
    write_records(
        run.path("dataset/train.jsonl"), [first.model_copy(update={"prompt": prompt}), *others]
    )
    pair = dataset(run)[0]
    rows, cache = captured(run)
    signal = cache.read([rows[pair.response.id]])[rows[pair.response.id].example]
    firsts = np.cumsum(signal.counts_N, dtype=int) - signal.counts_N
    wanted = exact(run, pair)
    assert signal.ids_E[firsts].tolist() == wanted.argmax(-1).tolist()
    assert signal.ids_E[firsts].tolist() != exact(run, first).argmax(-1).tolist()


def test_what_the_store_holds_is_not_read_again_by_any_run(tmp_path, monkeypatch):
    rows, cache = captured(make_run(tmp_path))
    before = {path.name: path.read_bytes() for path in cache.folder.glob("*.signals")}
    monkeypatch.setattr(capture, "fill", lambda *words: pytest.fail("read again"))
    again, _ = captured(make_run(tmp_path, "other", seed=7))
    assert again == rows
    assert before == {path.name: path.read_bytes() for path in cache.folder.glob("*.signals")}


def test_a_stopped_capture_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_cache, "CHUNK_TOKENS", 60)
    whole, cache = captured(make_run(tmp_path / "whole"))
    run, append, seen = make_run(tmp_path / "cut"), SignalCache.append, []

    def stops(self, rows, signal):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows)
        append(self, rows, signal)

    with monkeypatch.context() as patch:
        patch.setattr(SignalCache, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            capture.main(run.config, run)
    rows, other = captured(run)
    assert rows == whole
    names = [path.name for path in sorted(cache.folder.glob("*.signals"))]
    assert names == [path.name for path in sorted(other.folder.glob("*.signals"))]
    assert len(names) > 3
    for name in names:
        assert (cache.folder / name).read_bytes() == (other.folder / name).read_bytes()


def other_weights(folder: Path) -> None:
    path = folder / "teacher/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        {"signals": {"p": 0.5}},
        {"signals": {"temperatures": [2.0]}},
        {"template_date": "2025-01-01"},
    ],
)
def test_another_setting_has_a_cache_of_its_own(tmp_path, change):
    _, one = captured(make_run(tmp_path))
    _, other = captured(make_run(tmp_path, "other", **change))
    assert one.folder != other.folder and set(one.index) == set(other.index)


def test_other_weights_have_a_cache_of_their_own(tmp_path):
    _, one = captured(make_run(tmp_path))
    other_weights(tmp_path)
    _, other = captured(make_run(tmp_path, "other"))
    assert one.folder != other.folder


def test_different_tokenizers_are_one_line_that_names_the_way(tmp_path):
    run = make_run(tmp_path)
    make_tokenizer(("extra",)).save_pretrained(tmp_path / "teacher")
    with pytest.raises(
        DistillError, match=r"different tokenizers.*train on text: train\.loss="
    ) as e:
        capture.main(run.config, run)
    assert e.value.code == Exit.CONFIG and not run.config.store_folder().exists()


def test_an_answer_with_other_tokens_under_the_teacher_s_template_is_refused(tmp_path):
    run = make_run(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", SPECIAL[0])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(DistillError, match="other tokens under the teacher's chat template"):
        capture.main(run.config, run)


def test_a_cache_larger_than_the_disk_is_said_before_it_starts(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    space = type("Usage", (), {"free": 100})
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda folder: space)
    with pytest.raises(DistillError, match=r"take about .* GB, 0.0 GB are free \(free space") as e:
        capture.main(run.config, run)
    assert e.value.code == Exit.STATE and not list(tmp_path.rglob("*.signals"))


def test_a_teacher_whose_terms_are_not_known_captures_nothing(tmp_path):
    run = make_run(tmp_path, terms={})
    with pytest.raises(DistillError) as fault:
        capture.main(run.config, run)
    assert fault.value.code == Exit.TERMS


def test_a_run_with_soft_labels_goes_through_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_tiny(tmp_path / "teacher", "qwen2", seed=1, hidden=48)
    sharpen(tmp_path / "teacher")
    make_tiny(tmp_path / "model")
    sample = Path(__file__).parent.parent.parent / "data/gsm8k/sample.jsonl"
    words = (
        *("run", "configs/gsm8k.yaml", f"corpus.path={sample}", "corpus.limit=128"),
        *("train.loss={ce: 0.5, forward_kl: 0.5}", "teacher.model=./teacher"),
        *("student.model=./model", "terms.basis=a model of our own", "teacher.max_new_tokens=8"),
        *(
            "filters={truncated: false, failed_checker: false, repetition: false}",
            "train.max_steps=1",
        ),
        *("prompts={train: 12, validation: 2, heldout: 4, tasks: [math_word_problem]}",),
    )
    assert main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr().err
    assert "signals: done" in shown and "validation loss" in shown
    training = json.loads(Path("runs/gsm8k/training.json").read_text())
    assert training["loss"] == SOFT and {"ce", "forward_kl"} < training["history"][0].keys()
    assert [e.stage for e in Run(load_config(Path("runs/gsm8k/config.json"))).ledger.entries()][
        4
    ] == "signals"
    assert main(words) == 0
    assert capsys.readouterr().err.count("reused") == 8


def test_other_tokens_are_found_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    make_tokenizer(("extra",)).save_pretrained(tmp_path / "teacher")
    write_json(tmp_path / "c.json", run.config.resolved())
    assert main(("run", str(tmp_path / "c.json"))) == Exit.CONFIG
    assert "different tokenizers" in capsys.readouterr().err
    assert not run.path("documents.jsonl").exists()
