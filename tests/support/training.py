"""Trainings of tiny models: ragged pairs, runs, kills at a forward pass, equality to the bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from distill.config.tree import Config
from distill.models.chat_template import encode_prompt
from distill.models.loading import load_model, load_tokenizer
from distill.pipeline import STAGES
from distill.records import Message, Pair, Prompt, Response
from distill.storage.files import write_records
from distill.storage.run_folder import Run
from distill.training import adapters
from distill.training.batches import Example
from distill.training.encode import SPLITS, encode_split
from distill.training.student import StudentModel
from tests.support.tiny import make_tiny, make_tokenizer

DATE = "2026-01-01"
LENGTHS = (5, 1, 17, 33, 40)
SOFT = {"ce": 0.5, "forward_kl": 0.5}
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
TRAIN = {  # several steps of two micro-batches, saved each, in float32 for exact comparisons
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "tokens_per_step": 500,
    "micro_batch_tokens": 300,
    "eval_steps": 2,
    "save_steps": 1,
    "bf16": False,
    "lora": LORA,
}


def make_pair(question: str, answer: str, stop: str = "end") -> Pair:
    """Return a question and its answer."""
    messages = (Message(role="user", content=question),)
    prompt = Prompt.make(messages=messages, document_id=question, task="t")
    names = {"request_key": prompt.id, "prompt_id": prompt.id, "model": "m", "stop": stop}
    identity = Response.make_id(prompt.id, 0)
    response = Response.model_validate({"id": identity, "sample": 0, "text": answer, **names})
    return Pair(prompt=prompt, response=response)


def pairs(count: int, first: int = 0) -> list[Pair]:
    """Return pairs whose lengths are ragged."""
    return [
        make_pair(f"question {n} " + "word " * (n * 7 % 23), f"answer {n} " + "yes " * (n * 5 % 11))
        for n in range(first, first + count)
    ]


def examples(count: int = len(LENGTHS)) -> list[Example]:
    """Return examples of ragged lengths, two of which share their beginning."""
    return [
        Example(
            id=str(number),
            response_id="r",
            input_ids=tuple((7 * min(number, 3) + 3 * n) % 250 + 3 for n in range(length)),
            weights=tuple(float(n >= length // 2) for n in range(length)),
        )
        for number, length in enumerate(LENGTHS[:count])
    ]


def causal_model(source: Path | PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' own model of a folder, or a fresh one of a config."""
    kind: Any = AutoModelForCausalLM
    torch.manual_seed(0)
    make = kind.from_pretrained if isinstance(source, Path) else kind.from_config
    return make(source, dtype=dtype)


def adapted(
    folder: Path, targets: str | tuple[str, ...] = "all-linear", dropout: float = 0.0
) -> Any:
    """Return a tiny model with an adapter whose B is not zero."""
    wrapped = adapters.inject(causal_model(folder), 4, 8, dropout, targets, seed=1)
    torch.manual_seed(2)
    for name, parameter in adapters.parameters(wrapped).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's gradient, which it has."""
    assert tensor.grad is not None
    return tensor.grad


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of each adapter weight's gradient."""
    return {name: gradient(p).clone() for name, p in adapters.parameters(model).items()}


def plain_step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients by transformers and PEFT alone, one sample at a time."""
    total = 0.0
    for example in examples():
        ids = torch.tensor([example.input_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        loss = (losses * torch.tensor(example.weights[1:])).sum()
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def sharpen(folder: Path) -> None:
    """Scale a tiny model's weights: its distributions are peaked and hang on what came before."""
    path = folder / "model.safetensors"
    tensors = {name: t * (1 if t.dim() == 1 else 12) for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def other_weights(folder: Path) -> None:
    """Change a model's weights a little."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, path, {"format": "pt"})


def make_run(folder: Path, name: str = "run", count: int = 24, **train: Any) -> Run:
    """Return a run with a tiny student, a dataset of `count` pairs, and no teacher to speak of."""
    defaults = {**TRAIN, "tokens_per_step": 600, "eval_steps": 3, "save_steps": None}
    settings = {**defaults, "micro_batch_tokens": None, "lora": {"r": 4, "alpha": 8}, **train}
    teacher = {"kind": "canned", "answers": folder / "none"}
    return _make(folder, name, count, {"teacher": teacher, "train": settings})


def make_soft_run(folder: Path, name: str = "run", count: int = 9, **changes: Any) -> Run:
    """Return a run of a tiny peaked teacher and a tinier student that share a tokenizer."""
    if not (folder / "teacher").exists():
        make_tiny(folder / "teacher", "qwen2", seed=1, hidden=48)
        sharpen(folder / "teacher")
    tree = {
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "terms": {"basis": "a model of our own"},
        "train": {"loss": SOFT},
    }
    return _make(folder, name, count, {**tree, **changes})


def _make(folder: Path, name: str, count: int, tree: dict[str, Any]) -> Run:
    if not (folder / "model").exists():
        make_tiny(folder / "model")
    student = {"model": str(folder / "model")}
    source = {"name": name, "runs": folder / "runs", "corpus": {"source": "python-docs"}}
    run = Run(Config.model_validate({"student": student, **source, **tree}))
    if not run.path("dataset/train.jsonl").exists():
        write_records(run.path("documents.jsonl"), [])
        write_records(run.path("dataset/train.jsonl"), pairs(count))
        write_records(run.path("dataset/validation.jsonl"), pairs(max(3, count // 6), first=100))
    return run


def encoded(run: Run) -> list[Example]:
    """Return the examples of a run's training and validation."""
    return [e for s in SPLITS for e in encode_split(make_tokenizer(), run, s, 2048)]


@torch.no_grad()
def exact_logs(run: Run, pair: Pair, more: int = 0, model: str | None = None) -> torch.Tensor:
    """Return the teacher's log-probabilities (N, V) of an answer's tokens and its end, read alone.

    `more` is how many ids beyond the tokenizer's count, `model` another model than the teacher.
    """
    reference = model or run.config.teacher.model
    assert reference
    network: Any = load_model(reference, "float32")
    tokenizer: Any = load_tokenizer(reference)
    prompt = encode_prompt(tokenizer, pair.prompt.asked_of_teacher(), run.config.template_date)
    text = f"{pair.response.text}<|im_end|>\n"
    answer = tokenizer(text, add_special_tokens=False)["input_ids"][:-1]
    logits = network(input_ids=torch.tensor([prompt + answer])).logits[0]
    own = logits[len(prompt) - 1 : -1, : len(tokenizer) + more]
    return torch.log_softmax(own.double(), -1)


def perform(run: Run, name: str) -> None:
    """Perform a stage of a run by its name."""
    run.perform(next(stage for stage in STAGES if stage.name == name))


def training(run: Run) -> dict[str, Any]:
    """Return a run's training.json."""
    return json.loads(run.path("training.json").read_text())


def outcome(run: Run) -> dict[str, Any]:
    """Return everything that must be equal; times are left out."""
    made = training(run)
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in made["history"]]
    last = sorted(run.path("checkpoints").iterdir())[-1]
    return {
        "history": history,
        "validation": made["validation"],
        "adapter": load_file(run.path("adapter") / adapters.WEIGHTS),
        "optimizer": load_file(last / "optimizer.safetensors"),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Hold two outcomes against each other, to the bit."""
    assert one["history"] == other["history"] and one["validation"] == other["validation"]
    for part in ("adapter", "optimizer"):
        assert equal(one[part], other[part]), part


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether two groups of tensors are the same."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Hold the steps of two outcomes against each other, up to rounding."""
    for part in ("history", "validation"):
        for row, same in zip(one[part], other[part], strict=True):
            assert row.keys() == same.keys()
            for key, value in row.items():
                assert value == pytest.approx(same[key], rel=1e-3 if key == "grad_norm" else 1e-4)


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Stop the block in its forward pass number `call` (validation counts too)."""
    forward, count = StudentModel.forward, [0]

    def counted(self: StudentModel, batch: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == call:
            raise Killed
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StudentModel, "forward", counted)
        yield
