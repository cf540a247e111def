"""The model card: metadata in the Hub's documented fields, and a page that says what the student is, kept and cost.

Every figure comes from the run's scorecard. Text from outside (names, reasons, paths) cannot end the metadata, break a
table or add markup: metadata goes through the YAML writer with its control characters removed, the page escapes it.
"""

import html
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distill.evaluation.measurements import MODELS, MetricRow, Rival
from distill.evaluation.scorecard import RequestCost, Scorecard, TrainingSummary, WorstAnswer
from distill.formatting import UNKNOWN
from distill.publishing.fidelity import Fidelity
from distill.records import Record
from distill.report.statement import saving_rows, sensitivity_rows, statement
from distill.report.tables import (
    UNDECIDED,
    claims_too_much,
    contamination_sentence,
    gap_claims_too_much,
)

LICENSES = re.compile(
    r"(?:apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(?:-nc)?(?:-sa)?-4\.0|llama[23.]+|gemma)"
)
UNKNOWN_WORD = "unknown"


class Facts(Record):
    """What the card says beside the scorecard's figures."""

    model_name: str
    repository: str
    base: str  # Hub id
    base_revision: str | None
    license: str
    license_stated: bool  # by the publisher, because the table of models does not know the base
    language: str
    teacher: str
    teacher_license: str | None
    corpus: str
    dataset: str | None  # Hub id, where the corpus is one
    converted_from: str | None  # quantisation of the GGUF that was dequantised
    lora: dict[str, Any]
    terms: tuple[str, ...] = ()  # what allows training on the teacher's answers, and the duties
    displays: tuple[str, ...] = ()  # lines that a license wants shown
    license_owed: bool = False  # to the terms of teacher or base
    overridden: tuple[str, ...] = ()  # what the release gate found
    override: str | None = None  # why it was published all the same


def make_card(facts: Facts, scorecard: Scorecard, fidelity: Fidelity | None) -> ModelCard:
    """Write the card; `scorecard` is the content of scorecard.json."""
    data = metadata(facts, scorecard)
    body = "\n\n".join(part for part in sections(facts, scorecard, fidelity) if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def metadata(facts: Facts, scorecard: Scorecard) -> ModelCardData:
    """Return the card's metadata; `base_model` means weights, so it is the student's base, never the teacher."""
    name = facts.license.lower()
    known = LICENSES.fullmatch(name) is not None
    return ModelCardData(
        language=one_line(facts.language),
        license=name if known else "other",
        license_name=None
        if known
        else re.sub(r"[^a-z0-9.]+", "-", name).strip("-") or UNKNOWN_WORD,
        license_link=None if known else "LICENSE",
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=one_line(facts.base),
        base_model_relation="finetune",
        datasets=[one_line(facts.dataset)] if facts.dataset else None,
        tags=["distillation", "knowledge-distillation", "lora", "peft"],
        model_name=one_line(facts.model_name),
        eval_results=evaluation(facts, scorecard) or None,
    )


def evaluation(facts: Facts, scorecard: Scorecard) -> list[EvalResult]:
    """Return the student's scores on held-out items in the form of the model index."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name=one_line(task),
            dataset_type=one_line(facts.dataset or "custom"),
            dataset_config=one_line(task),  # else the index joins all tasks into one
            dataset_name=one_line(f"held-out documents of {facts.corpus}"),
            metric_type=re.sub(r"[^a-z0-9]+", "_", row.metric.lower()).strip("_") or UNKNOWN_WORD,
            metric_name=one_line(f"{row.metric} ({row.n} items)"),
            metric_value=row.student,
        )
        for task, row in scorecard.tasks.items()
        if row.student is not None
    ]


def one_line(value: Any) -> str:
    """Return text for the metadata: one line, no control or invisible separator characters, never empty."""
    kept = "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(kept.split()) or UNKNOWN_WORD


def cell(value: Any) -> str:
    """Return text for the page, where no markup of its own survives."""
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(one_line(value), quote=False))


def words(name: Any) -> str:
    """Return the name of a task or metric as words for the page."""
    return cell(str(name).replace("_", " "))


def number(value: Any) -> str:
    """Return a figure with three significant digits, or a dash where it is not known."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return UNKNOWN
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the cells are taken as they are."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sections(facts: Facts, scorecard: Scorecard, fidelity: Fidelity | None) -> Iterable[str]:
    """Yield the parts of the page in their order."""
    yield f"# {cell(facts.model_name)}"
    yield (
        f"A student distilled from **{cell(facts.teacher)}**, on {cell(facts.corpus)}, starting from "
        f"[{cell(facts.base)}](https://huggingface.co/{cell(facts.base)})."
    )
    yield "\n\n".join(f"**{cell(line)}**" for line in facts.displays)
    yield _override(facts)
    yield _scores(scorecard)
    yield _agreement(scorecard)
    yield _costs(scorecard)
    yield _saves(scorecard)
    yield _failures(scorecard)
    yield _contamination(scorecard)
    yield _data(facts, scorecard)
    yield _use(facts)
    yield _limits(facts, fidelity)
    yield _license(facts)


def _override(facts: Facts) -> str:
    """Return what spoke against publishing, and the reason that the publisher gave."""
    if facts.override is None:
        return ""
    found = "\n".join(f"- {cell(line)}" for line in facts.overridden)
    return f"**Published although:**\n\n{found}\n\nThe publisher's reason: {cell(facts.override)}"


def _scores(scorecard: Scorecard) -> str:
    """Return the tasks' rows, and that of all checks together where there are several tasks."""
    rows = dict(scorecard.tasks)
    if len(rows) > 1 and scorecard.overall:
        rows["all checks"] = scorecard.overall
    head = (
        *("task", "metric", "n", "teacher", "before", "student"),
        *("student − teacher", "student − before", "gap recovered"),
    )
    note = (
        "Held-out documents, never seen in training; *before* is the student untrained. Brackets are "
        f"{scorecard.confidence:.0%} intervals, paired on the same items and clustered by document; a dash "
        "is a figure that is not known."
    )
    body = [
        (
            words(task),
            words(row.metric),
            str(row.n),
            *(number(row.mean(model)) for model in MODELS),
            _difference(row, "teacher"),
            _difference(row, "base"),
            _gap(row),
        )
        for task, row in rows.items()
    ]
    return f"## How much of the teacher it kept\n\n{table(head, body)}\n\n{note}"


def _difference(row: MetricRow, rival: Rival) -> str:
    """Return a difference and its interval, which is left out where it would claim too much."""
    difference = row.against(rival)
    if difference.mean is None:
        return UNKNOWN
    if claims_too_much(difference.low, difference.high, row.conclude(rival)):
        return f"{number(difference.mean)} {UNDECIDED}"
    return f"{number(difference.mean)} [{number(difference.low)}, {number(difference.high)}]"


def _gap(row: MetricRow) -> str:
    ratio = row.gap_recovered
    if ratio.value is None:
        return UNKNOWN
    if gap_claims_too_much(row):
        return f"{number(ratio.value)} {UNDECIDED}"
    return f"{number(ratio.value)} [{number(ratio.low)}, {number(ratio.high)}]"


def _agreement(scorecard: Scorecard) -> str:
    """Return the likeness to the teacher's answers, which is never the headline."""
    rows = [
        (words(row.metric or name), str(row.n), number(row.base), number(row.student))
        for name, row in scorecard.agreement.items()
    ]
    if not rows:
        return ""
    return "### Agreement with the teacher's answers\n\n" + table(
        ("measure", "n", "before", "student"), rows
    )


def _costs(scorecard: Scorecard) -> str:
    cost = scorecard.cost
    sides: tuple[tuple[str, RequestCost], ...] = (
        ("teacher", cost.teacher),
        ("student", cost.student),
    )
    rows = [
        (name, number(side.seconds_per_1k), number(side.dollars_per_1k)) for name, side in sides
    ]
    prices = sorted({cell(side.price) for _, side in sides if side.price})
    made = cost.distillation
    took = f"{number(made.seconds)} s and {number(made.dollars)} dollars"
    parts = [
        "## What it costs",
        table(("1,000 requests", "seconds", "dollars"), rows),
        f"Making and measuring it took {took}." if made.seconds else "",
        f"Prices: {'; '.join(prices)}." if prices else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _saves(scorecard: Scorecard) -> str:
    """Return what the student saves, with the assumptions."""
    if not scorecard.economics:
        return ""
    sentences = statement(scorecard.economics, scorecard.confidence)
    tables = [
        table([cell(name) for name in head], [[cell(text) for text in row] for row in rows])
        for head, rows in (
            saving_rows(scorecard.economics),
            sensitivity_rows(scorecard.economics),
        )
    ]
    return "\n\n".join(["### What it saves", *map(cell, sentences), *tables])


def _failures(scorecard: Scorecard) -> str:
    """Return the worst samples, as they came, or why there are none."""
    failures = scorecard.failures
    if not failures.worst:
        why = failures.reason
        return f"## Where it fails\n\n{cell(why).capitalize()}." if why else ""
    shown = "\n\n".join(_failure(sample) for sample in failures.worst)
    return f"## Where it fails\n\nIts worst answer to each task, chosen by rule:\n\n{shown}"


def _failure(sample: WorstAnswer) -> str:
    sides = (
        ("Asked", sample.asked),
        ("The student", sample.student),
        ("The teacher", sample.teacher),
    )
    texts = "\n\n".join(f"{who}:\n\n{verbatim(text)}" for who, text in sides)
    return f"**{words(sample.task)}**: {cell(sample.reason)}\n\n{texts}"


def verbatim(text: Any) -> str:
    """Return text as it is, its lines kept, where no markup of its own survives."""
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in str(text))
    safe = re.sub(r"[`*_\[\]~]", lambda c: f"&#{ord(c[0])};", html.escape(kept, quote=False))
    return "<pre>\n" + "\n".join(f"  {line}" for line in safe.split("\n")) + "\n</pre>"


def _contamination(scorecard: Scorecard) -> str:
    """Return how much of what was measured stands in the training data."""
    sentence = contamination_sentence(scorecard.contamination, scorecard.overall)
    return f"### Contamination\n\n{cell(sentence)}" if sentence else ""


def _data(facts: Facts, scorecard: Scorecard) -> str:
    """Return what it was trained on, with the funnel of kept and dropped answers."""
    training, funnel = scorecard.training, scorecard.funnel
    lines = [
        f"- corpus: {cell(facts.corpus)}",
        f"- answers of the teacher {cell(facts.teacher)}, license {cell(facts.teacher_license or UNKNOWN_WORD)}",
        f"- {number(training.examples)} examples, {number(training.steps)} steps, "
        f"{number(training.tokens)} tokens",
        *_soft(training),
        "- LoRA " + ", ".join(f"{words(k)} {cell(v)}" for k, v in facts.lora.items()),
    ]
    if not funnel.model_fields_set:
        return "## What it was trained on\n\n" + "\n".join(lines)
    counts = {
        "prompts": funnel.prompts,
        "answers": funnel.answers,
        "kept for training": funnel.kept_train,
        "kept for validation": funnel.kept_validation,
        "held out": funnel.kept_heldout,
        **{f"dropped, {reason}": n for reason, n in funnel.dropped.items()},
    }
    body = [(words(name), str(n)) for name, n in counts.items()]
    shown = table(("funnel", "count"), body)
    return "## What it was trained on\n\n" + "\n".join(lines) + f"\n\n{shown}"


def _soft(training: TrainingSummary) -> Iterable[str]:
    """Yield what was trained towards besides the teacher's words: its distributions, also at the student's own words."""
    if training.loss:
        shares = ", ".join(f"{cell(v)} of {words(k)}" for k, v in training.loss.items())
        yield f"- loss: {shares}, towards the teacher's distributions ({cell(training.labels)})"
    if rounds := training.on_policy:
        answers, tokens = sum(r.answers for r in rounds), sum(r.tokens for r in rounds)
        yield f"- then on policy: {len(rounds)} rounds, {number(answers)} answers of the student, {number(tokens)} tokens"


def _use(facts: Facts) -> str:
    """Return snippets that run as they stand."""
    name = facts.repository
    return f"""## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The adapter alone, on its base:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{one_line(facts.base)}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}", subfolder="adapter")
```"""


def _limits(facts: Facts, fidelity: Fidelity | None) -> str:
    lines = ["- It was measured on the tasks above only; elsewhere it may be worse than its base."]
    if facts.converted_from:
        lines.append(
            f"- Training started from dequantised 4-bit weights ({cell(facts.converted_from)}) of the base. The scores belong "
            "to the merged model, which is the primary artefact; the adapter on the base's full-precision weights was "
            "not measured."
        )
    if fidelity is None:
        lines.append(
            "- The scores above are those of the merged model: evaluation loaded these files."
        )
        return "## Limits\n\n" + "\n".join(lines)
    verdict = (
        "so the scores above are given as the merged model's"
        if fidelity.same
        else "**so the scores above are the adapter's: the merged model has not been evaluated**"
    )
    lines.append(f"- The {fidelity.line()}; {verdict}.")
    return "## Limits\n\n" + "\n".join(lines)


def _license(facts: Facts) -> str:
    stated = " as stated by the publisher" if facts.license_stated else ", that of the base model"
    if facts.license_owed:
        stated = ", as the terms of its teacher or base ask"
    revision = f", revision {cell(facts.base_revision)}" if facts.base_revision else ""
    terms = "".join(f"\n- {cell(line)}" for line in facts.terms)
    return (
        f"## License\n\n{cell(facts.license)}{stated} ({cell(facts.base)}{revision}). The weights were changed by "
        "distillation as described above."
        + (f"\n\nTerms of the teacher:\n{terms}" if terms else "")
    )
