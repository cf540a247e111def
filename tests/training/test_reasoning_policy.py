"""`reasoning: drop | keep` from recorded rows to the release, with a template that thinks."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from distill.cli import main
from distill.errors import Exit
from distill.models.chat_template import find_turn
from distill.models.loading import load_tokenizer
from distill.records import Message, Pair, Response
from distill.storage.files import read_json, read_records
from distill.training.encode import encode_pair
from tests.support.fake_hub import fake_hub, use_hub
from tests.support.templates import chat_templates
from tests.support.tiny import make_tiny

BASE = "acme/tiny-thinker"
THOUGHT = "It is\n\nnumber"


@pytest.mark.parametrize("reasoning", ["drop", "keep"])
def test_one_policy_holds_from_recorded_rows_to_the_release(tmp_path: Path, reasoning: str) -> None:
    """A4, B7: training, evaluation and the released template mean the same, without a switch."""
    base = make_tiny(tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = chat_templates()["qwen3"]
    tokenizer.save_pretrained(base)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {n} about the {n * 7} apples?"},
                {
                    "role": "assistant",
                    "content": f"  Answer {n}.\n" + "word " * n,
                    "reasoning_content": f"{THOUGHT} {n}",
                },
            ]
        }
        for n in range(24)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = {
        "name": "tiny",
        "reasoning": reasoning,
        "corpus": {"path": "rows.jsonl", "near_duplicate_threshold": None},
        "teacher": {"kind": "recorded", "license": "MIT", "max_new_tokens": 8},
        "student": {"model": BASE, "dtype": "float32"},
        "train": {"max_steps": 2, "bf16": False, "lora": {"r": 2}},
        "evaluation": {"bootstrap_samples": 100},
        "publish": {"license": "Apache-2.0"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    with fake_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add(BASE, files)
        use_hub(patch, hub, tmp_path / "hub")
        with contextlib.chdir(tmp_path):
            assert main(["run", "c.yaml"]) == 0
            assert main(["publish", "runs/tiny", "--override", "a test"]) == 0
            changed = "drop" if reasoning == "keep" else "keep"
            assert main(["run", "c.yaml", f"reasoning={changed}"]) == Exit.STATE
    run = tmp_path / "runs/tiny"
    released = AutoTokenizer.from_pretrained(run / "release")
    pair = next(iter(read_records(run / "dataset/train.jsonl", Pair)))
    example = encode_pair(released, pair, "2026-01-01")
    turns = [{"role": m.role, "content": m.content} for m in pair.prompt.messages]
    prompt = released.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(example.input_ids[: len(prompt)]) == prompt
    assert example.weights[len(prompt) - 1 : len(prompt) + 1] == (0.0, 1.0)
    learnt = str(released.decode(example.input_ids[len(prompt) :]))
    recorded = next(
        row["messages"][1]
        for row in rows
        if row["messages"][0]["content"] == pair.prompt.messages[-1].content
    )
    thought = f"<think>\n{recorded['reasoning_content']}\n</think>\n\n"
    assert learnt == (thought if reasoning == "keep" else "") + f"{recorded['content']}<|im_end|>"
    question = [Message(role="user", content="?")]
    asked = find_turn(released, question, "2026-01-01").prompt
    assert asked.endswith("</think>\n\n") == (reasoning == "drop")
    card = (run / "release/README.md").read_text()
    assert ("answers at once" in card) == (reasoning == "drop")
    models = read_json(run / "scorecard.json")["models"]
    assert models["base"]["template_hash"] == models["student"]["template_hash"]
    for model in ("base", "student"):
        answers = read_records(run / f"answers/{model}.jsonl", Response)
        assert all("<think>" not in answer.text for answer in answers)
