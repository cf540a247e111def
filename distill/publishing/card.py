"""The model card: metadata in the Hub's documented fields, and the page of templates/card.md.j2.

Every figure comes from the run's scorecard. Text from outside (names, reasons, paths) cannot end
the metadata: it goes through the YAML writer as one line without control characters.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from distill.config.teachers import Teacher
from distill.config.tree import Config, Corpus
from distill.evaluation.scorecard import Scorecard
from distill.formatting import one_line
from distill.models.registry import hub_id, is_folder, lookup
from distill.publishing.obligations import ReleaseLicense, base_of
from distill.publishing.parity import FileParity
from distill.report.render import PARAGRAPHS, environment

LICENSES = re.compile(
    r"(?:apache-2\.0|mit|bsd-[23]-clause|cc0-1\.0|cc-by(?:-nc)?(?:-sa)?-4\.0|llama[23.]+|gemma)"
)
UNKNOWN_WORD = "unknown"


class Facts(NamedTuple):
    """What the card says beside the scorecard's figures."""

    config: Config
    name: str
    repository: str | None  # OWNER/NAME
    license: ReleaseLicense
    terms: Sequence[str] = ()  # what allows training on the teacher's answers, and the duties
    displays: Sequence[str] = ()  # lines that a license wants shown
    own_template: bool = False  # its chat template is another than the base's
    folds_system: bool = False  # and has no system turn
    parity: Sequence[FileParity] = ()  # of the GGUF files
    overridden: Sequence[str] = ()  # what the release gate found
    override: str | None = None  # why it was published all the same


def make_card(facts: Facts, scorecard: Scorecard) -> ModelCard:
    """Write the card; `scorecard` is the content of scorecard.json."""
    config = facts.config
    student, teacher = lookup(config.student.model), lookup(config.teacher.model)
    text = card_text(
        "card.md.j2",
        metadata(facts, scorecard),
        facts=facts,
        card=scorecard,
        config=config,
        repository=facts.repository or f"OWNER/{facts.name}",
        base=base_of(config.student.model),
        base_revision=config.student.revision or (student.revision if student else None),
        converted_from=student.gguf.quantisation if student and student.gguf else None,
        teacher=teacher_name(config.teacher),
        teacher_license=config.teacher.license or (teacher.license if teacher else None),
        corpus=corpus_name(config.corpus),
    )
    return ModelCard(text)


def card_text(template: str, data: CardData, **context: object) -> str:
    """Return a card's text: its metadata, then the page that the template makes."""
    page = environment(markdown=True).get_template(template).render(context)
    page = PARAGRAPHS.sub("\n\n", page).strip()
    return f"---\n{data.to_yaml()}\n---\n\n{page}\n"


def metadata(facts: Facts, scorecard: Scorecard) -> ModelCardData:
    """Return the card's metadata; `base_model` means weights: the student's base."""

    def value(text: str) -> str:
        return one_line(text) or UNKNOWN_WORD

    config, dataset = facts.config, hub_dataset(facts.config.corpus)
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=value(task),
            dataset_type=value(dataset or "custom"),
            dataset_config=value(task),  # else the index joins all tasks into one
            dataset_name=value(f"held-out documents of {corpus_name(config.corpus)}"),
            metric_type=identifier(row.metric, "_"),
            metric_name=value(f"{row.metric} ({row.n} items)"),
            metric_value=row.student,
        )
        for task, row in scorecard.tasks.items()
        if row.student is not None
    ]
    return ModelCardData(
        language=value(config.publish.language),
        **license_fields([facts.license.name], "LICENSE"),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_of(config.student.model),
        base_model_relation="finetune",
        datasets=[value(dataset)] if dataset else None,
        tags=["distillation", "knowledge-distillation", "lora", "peft"],
        model_name=value(facts.name),
        eval_results=results or None,
    )


def identifier(text: str, separator: str, also: str = "") -> str:
    """Return a text as a name of small letters, digits and the characters in `also`."""
    name = re.sub(rf"[^a-z0-9{also}]+", separator, text.lower()).strip(separator)
    return name or UNKNOWN_WORD


def license_fields(names: Sequence[str], link: str) -> dict[str, Any]:
    """Return licenses in the Hub's fields; `link` is where one that it does not list stands."""
    on_hub = [name.lower() for name in names if LICENSES.fullmatch(name.lower())]
    listed = on_hub + ["other"] * (len(on_hub) < len(names))
    others = [identifier(name, "-", ".") for name in names if name.lower() not in on_hub]
    return {
        "license": listed if len(listed) > 1 else listed[0],
        "license_name": ", ".join(others) or None,
        "license_link": link if others else None,
    }


def teacher_name(teacher: Teacher) -> str:
    """Return what readers know a teacher by."""
    return hub_id(teacher.model) or Path(teacher.model).name


def corpus_name(corpus: Corpus) -> str:
    """Return what readers know a corpus by."""
    return (corpus.path.name if corpus.path else corpus.dataset) or corpus.source


def hub_dataset(corpus: Corpus) -> str | None:
    """Return the Hub id of a corpus, where it has one."""
    dataset = None if corpus.path else corpus.dataset
    return None if dataset is None or is_folder(dataset) else dataset
