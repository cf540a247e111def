"""Tiny experiments as a user wrote them at commit 07339c8: configs, files, models, and the server
that answers.

`scripts/record.py` performs them with old and new code side by side, and that commit made
tests/fixtures/old of them. Their keys and files have the names of that commit on purpose: what
was written then is read for ever. Whatever shapes a request's key (endpoint, interface, model,
revision, extra_body, omit, max_tokens_field, temperature, top_p, sample) is set in one of them to
other than its default.
"""

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from distill.evaluation.judge import load_probes
from tests.support.fake_teacher import FakeTeacher, Reply, question
from tests.support.tiny import make_tiny, make_tokenizer

COMMIT = "07339c8"
PORT = 18_765  # fixed: an endpoint's address is part of its requests' keys
URL = f"http://127.0.0.1:{PORT}/v1"
KEY_VARIABLE, KEY = "TINY_KEY", "canary-1618033988749894"
TEACHER, STUDENT = "acme/tiny-teacher", "acme/tiny-student"
COMMITS = {TEACHER: "7" * 40, STUDENT: "5" * 40}  # of the Hub's cache in `hub/`

TRAIN: dict[str, Any] = {
    "max_steps": 4,
    "tokens_per_step": 256,
    "learning_rate": 5e-3,
    "max_length": 1024,
    "bf16": False,
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": False,  # the best step was not kept rightly at that commit
    "lora": {
        "r": 1,
        "alpha": 2,
    },  # products of single numbers: every processor merges to the same bits
}
SOFT = {"ce": 0.5, "forward_kl": 0.5}
EVALUATION: dict[str, Any] = {
    "samples": 200,
    "machine": "desk",
    "prices": "prices.yaml",
    "max_new_tokens": 16,
}
SUMS: dict[str, Any] = {
    "corpus": {
        "path": "sums.jsonl",
        "format": "prompts",
        "near_duplicate_threshold": None,
        "split": {"validation": 2, "heldout": 6},
    },
    "prompts": {"tasks": ["tasks/sum.yaml"]},
}
NOTES: dict[str, Any] = {
    "corpus": {"path": "notes", "split": {"validation": 2, "heldout": 4}},
    "prompts": {"tasks": ["tasks/gist.yaml", "prose_summary"], "per_document": "rotate"},
}
LENIENT = {"truncated": False, "repetition": False, "failed_checker": False, "wrong_format": False}
ENDPOINT: dict[str, Any] = {
    "kind": "endpoint",
    "model": "fake-1",
    "base_url": URL,
    "max_new_tokens": 40,
    "concurrency": 1,
    "max_retries": 0,
}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    # paid: documents, questions that the teacher writes, a key, a budget, log-probabilities that
    # come with the answers
    "chat": {
        **NOTES,
        "prompts": {
            **NOTES["prompts"],
            "questions": {"kinds": ["factual"], "per_document": 1, "max_new_tokens": 60},
        },
        "teacher": {
            **ENDPOINT,
            "api_key_env": KEY_VARIABLE,
            "budget_dollars": "1.50",
            "max_tokens_field": "max_completion_tokens",
            "omit": ["temperature"],
            "extra_body": {"logprobs": True, "top_logprobs": 2},
        },
        "signals": {"from_answers": True, "k": 2},
        "student": {"model": STUDENT, "dtype": "float32"},
        "train": {**TRAIN, "loss": SOFT},
        "evaluation": EVALUATION,
        "publish": {"licence": "Apache-2.0", "model_name": "tiny-notes"},
    },
    # paid: text completions, two samples of each, distributions from a server, a judge
    "completions": {
        **SUMS,
        "teacher": {
            **ENDPOINT,
            "base_url": [URL],
            "api": "completions",
            "revision": "v2",
            "n": 2,
            "temperature": 0.7,
            "top_p": 0.9,
            "extra_body": {"repetition_penalty": 1.0},
        },
        "terms": {"basis": "a server of our own"},
        "signals": {"k": 2, "endpoint": {**ENDPOINT, "model": "fake-scorer"}},
        "student": {"model": "./models/student", "dtype": "float32"},
        "train": {**TRAIN, "loss": SOFT},
        "evaluation": {
            **EVALUATION,
            "judge": {**ENDPOINT, "model": "judge-1", "max_new_tokens": 64},
        },
    },
    # local: two sampled answers of each prompt, models of the Hub, a suite
    "local": {
        **NOTES,
        "teacher": {
            "model": TEACHER,
            "dtype": "float32",
            "n": 2,
            "temperature": 0.8,
            "max_new_tokens": 24,
            "slots": 4,
        },
        "filters": LENIENT,
        "student": {"model": STUDENT, "dtype": "float32"},
        "train": TRAIN,
        "evaluation": {**EVALUATION, "suites": ["suite/products.yaml"]},
        "publish": {"licence": "Apache-2.0"},
    },
    # local: models in folders, distributions kept in the store, a round of the student's own
    # answers
    "soft": {
        **SUMS,
        "teacher": {"model": "./models/teacher", "dtype": "float32", "max_new_tokens": 16},
        "terms": {"basis": "a model of our own"},
        "filters": LENIENT,
        "signals": {"p": 0.9, "k": 8},
        "student": {"model": "./models/student", "dtype": "float32"},
        "train": {**TRAIN, "loss": SOFT},
        # a temperature so low that no key, which seeds the draws, decides what is said
        "on_policy": {"rounds": 1, "prompts": 4, "max_new_tokens": 8, "temperature": 0.001},
        "evaluation": EVALUATION,
        "publish": {"licence": "Apache-2.0"},
    },
}
WITHHELD = "Kotor ships"  # no answer says so
PAID = ("chat", "completions")

TOWNS = {
    "Arvika": ("salt", "a brass bell", "Monday"),
    "Belmora": ("wool", "an old lighthouse", "Tuesday"),
    "Cascina": ("glass", "three cranes", "Wednesday"),
    "Dunfell": ("slate", "a stone pier", "Thursday"),
    "Eskilde": ("amber", "a wooden mill", "Friday"),
    "Farsund": ("herring", "two smokehouses", "Saturday"),
    "Gavorrano": ("marble", "an iron crane", "Sunday"),
    "Hollin": ("cider", "a cooper's yard", "market days"),
    "Istria": ("olives", "a stone press", "feast days"),
    "Jelling": ("tar", "a rope walk", "new moon"),
    "Kotor": ("candles", "a customs house", "full moon"),
    "Lerwick": ("sealskin", "a whale arch", "midsummer"),
}
MODEL_ROW = {
    "licence": "Apache-2.0",
    "shape": {
        "layers": 1,
        "hidden": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "intermediate": 32,
        "vocab": 264,
        "tied": True,
        "context": 2048,
        "parameters": 6576,
    },
}
PRICES = {
    "machines": [
        {
            "name": "desk",
            "what": "a desk",
            "dollars_per_hour": "0.10",
            "date": "2099-01-01",  # a price grows old after a year
            "source": "made up",
        }
    ],
    "tokens": [
        {
            "model": model,
            "dollars_per_million_input": "3",
            "dollars_per_million_output": "15",
            "date": "2099-01-01",
            "source": "made up",
        }
        for model in ("fake-*", "judge-*")
    ],
}
OWN_TERMS = [
    {
        "title": "Terms of the tiny teachers",
        "teachers": ["fake-*", "judge-*", "acme/*"],
        "may_train": "yes",
        "clause": "1: answers may train any model",
        "url": "https://example.org/terms",
        "version": "1",
        "read": "2026-11-01",
    }
]
GIST = {
    "student": {
        "system": "Answer in plain words.",
        "user": "What does this note say?\n\n{{ document.text }}",
    },
    "teacher": {"system": "Answer in one sentence, in plain words."},
}
SUM = {"metric": "correct", "student": {"user": "{{ prompt }}"}, "checker": {"kind": "number"}}
SUITE = {
    "name": "products",
    "description": "small products",
    "source": "made up",
    "licence": "none",
    "tasks": [
        {
            "task": {
                "name": "product",
                "metric": "correct",
                "student": {"user": "{{ prompt }}"},
                "checker": {"kind": "number"},
            },
            "data": {"path": "products.jsonl"},
            "n": 4,
            "max_new_tokens": 8,
        }
    ],
}


def write_files(folder: Path, port: int = PORT) -> None:
    """Write all that a user has before a run: configs, corpora, tasks, a suite, tables, models and
    the Hub's cache.

    The server is expected at `port`.
    """
    for name, tree in EXPERIMENTS.items():
        _write_yaml(folder / f"{name}.yaml", {"name": name, **tree})
        config = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(config.replace(str(PORT), str(port)), encoding="utf-8")
    for name, tree in {
        "tasks/gist": GIST,
        "tasks/sum": SUM,
        "suite/products": SUITE,
        "prices": PRICES,
        "configs/terms": OWN_TERMS,
        "configs/models": {
            name: {"hub_id": name, "revision": revision, **MODEL_ROW}
            for name, revision in COMMITS.items()
        },
    }.items():
        _write_yaml(folder / f"{name}.yaml", tree)
    for name, (goods, sight, day) in TOWNS.items():
        text = f"# {name}\n\n{name} ships {goods}. Its quay has {sight}. Boats leave on {day}.\n"
        (folder / "notes").mkdir(exist_ok=True)
        (folder / f"notes/{name.lower()}.md").write_text(text, encoding="utf-8")
    pairs = [(a, b) for a in range(2, 9) for b in (3, 11)]
    sums = [{"prompt": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in pairs]
    products = [{"question": f"{a} * {b}?", "answer": str(a * b)} for a, b in pairs]
    _write_lines(folder / "sums.jsonl", sums)
    _write_lines(folder / "suite/products.jsonl", products)
    write_models(folder)


def write_models(folder: Path) -> None:
    """Make a teacher and a student with random weights, in `models/` and as the Hub's cache has
    them in `hub/`."""
    for name, family, seed in (("teacher", "qwen2", 2), ("student", "llama", 3)):
        model = make_tiny(folder / "models" / name, family, seed=seed, hidden=16, layers=1)
        weights = model / "model.safetensors"
        peaked = {name: t * (1 if t.dim() == 1 else 12) for name, t in load_file(weights).items()}
        save_file(peaked, weights, {"format": "pt"})  # what it says depends on what it is asked
    for name, local in ((TEACHER, "teacher"), (STUDENT, "student")):
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder / "models" / local, cached / "snapshots" / COMMITS[name])
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text(COMMITS[name])


def _write_yaml(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(tree))  # YAML names what it has seen before, which we do not read
    path.write_text(str(yaml.safe_dump(plain, sort_keys=False, width=100)), encoding="utf-8")


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(
    tree: Path, folder: Path, *words: str, **changes: str
) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that let the distill of a source tree work on the
    files of `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "hub"),
        KEY_VARIABLE: KEY,
        **changes,
    }
    return [sys.executable, "-m", "distill", *words], environment


def serve(port: int = PORT) -> FakeTeacher:
    """Return the server of all paid experiments, to be used in a `with` block; what it says follows
    from what is asked."""
    return FakeTeacher(Replies(), port=port)


class Replies:
    """What the server says to a request; a question that comes again is answered in other words, as
    samples are."""

    def __init__(self) -> None:
        tokenizer = make_tokenizer()
        self.times: Counter[str] = Counter()
        self.words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        self.good = {probe.b for probe in load_probes()}

    def __call__(self, number: int, payload: dict[str, Any]) -> Reply:
        """Answer one request."""
        if "prompt_logprobs" in payload:
            return self._scored(payload["prompt"], payload["prompt_logprobs"])
        key = json.dumps(payload, sort_keys=True)
        text = self._text(question(payload), self.times[key])
        self.times[key] += 1
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if WITHHELD in text:
            choice["finish_reason"] = "content_filter"
        if "messages" in payload:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if payload.get("logprobs"):
            choice["logprobs"] = {"content": _lists(text, payload["top_logprobs"])}
        usage = {"prompt_tokens": len(question(payload)), "completion_tokens": len(text)}
        return Reply(answer={"choices": [choice], "usage": usage})

    def _text(self, asked: str, before: int) -> str:
        if "ANSWER A BEGINS" in asked:
            return self._verdict(asked)
        if sums := re.findall(r"What is (\d+) plus (\d+)", asked):
            a, b = map(int, sums[-1])
            wrong = (a + b) % 9 == 0  # so that a checker has something to drop
            word = ("=", "makes")[before % 2]
            return f"{a} + {b} {word} {a + b + wrong}\n#### {a + b + wrong}"
        if town := re.search(r"(\w+) ships (\w+)", asked):
            if "Write one question" in asked:
                return f"What goods does the harbour of {town[1]} ship?"
            return f"{town[1]} ships {town[2]}."
        return "one two three"

    def _verdict(self, asked: str) -> str:
        """Prefer a real answer to a probe's rival, and an answer that reckons to one that does
        not."""
        answers = re.findall(r"ANSWER [AB] BEGINS\]\n(.*?)\n\[\w+ ANSWER", asked, re.S)
        a, b = (text in self.good or "####" in text for text in answers)
        return f"It says more.\nVERDICT: {'TIE' if a == b else 'A' if a else 'B'}"

    def _scored(self, ids: Sequence[int], k: int) -> Reply:
        """List the `k` ids that come first at each place of a text, and the text's own, as vLLM
        does."""
        places: list[Any] = [None]
        for place, own in enumerate(ids[1:], 1):
            others = [(own + place * n) % len(self.words) for n in range(1, k)]
            logs = {own: round(-0.2 - 0.01 * (place % 9), 2)} | {
                i: -3.0 - n for n, i in enumerate(others) if i != own
            }
            places.append(
                {str(i): {"logprob": x, "decoded_token": self.words[i]} for i, x in logs.items()}
            )
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": places}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return Reply(answer={"choices": [choice], "usage": usage})


def _lists(text: str, k: int) -> list[dict[str, Any]]:
    """List each byte of a text, and the end of the turn, with the `k` likeliest beside it, as chats
    do."""
    rows = []
    for place, token in enumerate([*text, "<|im_end|>"]):
        logs = {token: round(-0.3 - 0.01 * (place % 7), 2)}
        logs |= {chr(97 + (place * 5 + n) % 26): -3.0 - n for n in range(1, k)} | logs
        listed = [{"token": t, "logprob": x} for t, x in logs.items()]
        rows.append({**listed[0], "top_logprobs": listed[:k]})
    return rows
