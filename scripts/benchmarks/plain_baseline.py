"""The plain script that the quickstart is measured against: transformers and PEFT, nothing of
distill's engine.

It does what a practitioner writes in an afternoon: the teacher answers in padded batches, the
student answers before training, a LoRA is trained by a plain loop over padded batches of 8 for two
epochs, the student answers after, and its loss on the teacher's answers is taken before and after.
It reads the prompts of a finished distill run, so both sides ask the same. Command: `python
scripts/benchmarks/plain_baseline.py RUN TEACHER STUDENT OUT.json [--sorted]`, with folders of
models; `--sorted` gives it its best flag: batches of prompts of similar length.
"""

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

START = time.time()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup  # noqa: E402

NEW_TOKENS, GENERATE_BATCH, BATCH, EPOCHS, RATE = 128, 30, 8, 2, 5e-4


def read(run: Path) -> dict[str, list[dict]]:
    """Return the run's prompts by split."""
    documents = [
        json.loads(line) for line in (run / "documents.jsonl").read_text("utf-8").splitlines()
    ]
    split = {d["id"]: d["split"] for d in documents}
    prompts = [json.loads(line) for line in (run / "prompts.jsonl").read_text("utf-8").splitlines()]
    return {s: [p for p in prompts if split[p["document_id"]] == s] for s in ("train", "heldout")}


def load(folder: str) -> tuple[Any, Any]:
    """Load a model in bfloat16 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(folder, padding_side="left")


def render(tokenizer: Any, prompt: dict) -> str:
    """Render the prompt up to where the answer begins."""
    return tokenizer.apply_chat_template(
        prompt["messages"], tokenize=False, add_generation_prompt=True
    )


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompts: list[dict], by_length: bool) -> dict[str, str]:
    """Answer greedily in padded batches; returns prompt id to text."""
    model.eval()
    order = sorted(prompts, key=lambda p: len(render(tokenizer, p))) if by_length else prompts
    answers = {}
    for i in range(0, len(order), GENERATE_BATCH):
        batch = order[i : i + GENERATE_BATCH]
        texts = [render(tokenizer, p) for p in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        for prompt, text in zip(
            batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            answers[prompt["id"]] = text
    return answers


def encode(tokenizer: Any, prompt: dict, text: str) -> tuple[list[int], int]:
    """Return ids of prompt and answer, and how many belong to the prompt."""
    head = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    tail = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return head + tail, len(head)


def collate(rows: list[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right, with labels on the answers only."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def loss_on(model: Any, rows: list[tuple[list[int], int]], pad: int) -> float:
    """Return the mean loss in nats per answer token."""
    model.eval()
    total = count = 0.0
    for i in range(0, len(rows), BATCH):
        batch = collate(rows[i : i + BATCH], pad)
        n = int((batch["labels"][:, 1:] >= 0).sum())
        total, count = total + float(model(**batch).loss) * n, count + n
    return total / count


def train(model: Any, rows: list[tuple[list[int], int]], pad: int) -> None:
    """Train the adapter by a plain loop."""
    model.train()
    steps = math.ceil(len(rows) / BATCH) * EPOCHS
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    for epoch in range(EPOCHS):
        order = rows[:]
        random.Random(epoch).shuffle(order)
        for i in range(0, len(order), BATCH):
            loss = model(**collate(order[i : i + BATCH], pad)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def main(run: str, teacher: str, student: str, out: str, *flags: str) -> None:
    """Run the whole baseline and write answers, losses and times."""
    by_length, times, clock = "--sorted" in flags, {}, [time.time()]
    torch.manual_seed(0)

    def lap(name: str) -> None:
        times[name] = time.time() - clock[0]
        clock[0] = time.time()

    prompts = read(Path(run))
    model, tokenizer = load(teacher)
    lap("load teacher")
    told = answer(model, tokenizer, prompts["train"] + prompts["heldout"], by_length)
    lap("teacher")
    model, tokenizer = load(student)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train_rows, held_rows = (
        [encode(tokenizer, p, told[p["id"]]) for p in prompts[s]] for s in ("train", "heldout")
    )
    lap("load student")
    before = answer(model, tokenizer, prompts["heldout"], by_length)
    lap("student before")
    loss_before = loss_on(model, held_rows, pad)
    lap("loss before")
    model = get_peft_model(
        model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    train(model, train_rows, pad)
    lap("training")
    after = answer(model, tokenizer, prompts["heldout"], by_length)
    lap("student after")
    loss_after = loss_on(model, held_rows, pad)
    lap("loss after")
    result = {
        "teacher": told,
        "base": before,
        "student": after,
        "loss": {"base": loss_before, "student": loss_after},
    }
    times["total"] = time.time() - START
    Path(out).write_text(
        json.dumps(
            {
                **result,
                "seconds": times,
                "train_tokens": sum(len(r) for r, _ in train_rows) * EPOCHS,
            }
        )
    )
    print(json.dumps(times, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
