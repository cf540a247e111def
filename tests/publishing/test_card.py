"""The model card: the Hub's fields, the scorecard's figures, hostile values that stay values."""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.config.tree import Config
from distill.evaluation.scorecard import Scorecard
from distill.formatting import one_line
from distill.publishing import card as cards
from distill.publishing.card import Facts
from distill.publishing.obligations import ReleaseLicense
from tests.economics.test_savings import SIXTEEN, reckon

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MERGED = {"models": {"student": {"model_sha256": "1" * 64}}}


def make_card(facts: Facts, scorecard: dict[str, Any]) -> ModelCard:
    return cards.make_card(facts, Scorecard.model_validate({**MERGED, **scorecard}))


def plain_spaces(card: ModelCard) -> str:
    """Return a card's page with every run of spaces, hard ones too, as one."""
    return re.sub("[ \u00a0]+", " ", card.text)


SCORECARD: dict[str, Any] = {
    "tasks": {
        "api_json": {
            "metric": "valid_json", "n": 22, "teacher": 0.909, "base": 0.0, "student": 0.864,
            "student_minus_teacher": {"mean": -0.0455, "low": -0.2, "high": 0.1},
            "gap_recovered": {"value": 0.95, "low": 0.7, "high": 1.2},
        },
        "summary": {"metric": "chrF", "n": 22, "teacher": None, "base": 30.1, "student": 55.2},
    },
    "agreement": {"chrf": {"metric": "chrF", "n": 66, "base": 29.0, "student": 51.0}},
    "cost": {
        "teacher": {"seconds_per_1k": 800.0, "dollars_per_1k": 0.0181, "price": "a machine"},
        "student": {"seconds_per_1k": 210.0, "dollars_per_1k": 0.00476, "price": "a machine"},
        "distillation": {"seconds": 400.0, "dollars": 0.009},
    },
    "funnel": {"answers": 240, "kept_train": 231, "dropped": {"truncated": 9}},
    "training": {"examples": 231, "steps": 40, "tokens": 61234},
}  # fmt: skip
WORST = {
    "task": "api_json", "asked": "Describe <b>it</b>", "student": "## not\n---\n```json\n</pre>",
    "teacher": "{}", "reason": "not JSON",
}  # fmt: skip
CONTAMINATION = {
    "n": 66, "flagged": 0, "rate": {"mean": 0.0, "low": 0.0, "high": 0.054},
    "method": "A paraphrase is not found.",
}  # fmt: skip
CONFIG = Config.model_validate(
    {
        "name": "r", "corpus": {"source": "python-docs"},
        "teacher": {"model": "qwen2.5-coder-0.5b-instruct"},
        "student": {"model": "smollm2-135m-instruct", "chat_template_kwargs": {"short_form": True}},
    }
)  # fmt: skip
FACTS = Facts(
    CONFIG, "api-writer", "ann/api-writer", ReleaseLicense("Apache-2.0", False, False, "")
)
HOSTILE = st.one_of(
    st.text(max_size=80),
    st.sampled_from(
        ["a\nb", "---\nlicense: mit", "a: b", "<script>x</script>", "x | y", "`x`", "\u2028#x",
         "\x85---\x85", "[a](javascript:x)", "!!python/object:os.system", "&a *a", "null", "1e5",
         "'\"", "\ud800", "no", "- a"]
    ),
)  # fmt: skip


def test_the_page_tells_figures_and_limits_and_the_metadata_follows_the_hubs_fields():
    card = make_card(FACTS._replace(own_template=True, folds_system=True), SCORECARD)
    data, text = card.data.to_dict(), plain_spaces(card)
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "finetune" and data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0" and data["language"] == "en"
    assert "distillation" in data["tags"] and "datasets" not in data
    results = data["model-index"][0]["results"]
    assert [row["metrics"][0]["value"] for row in results] == [0.864, 55.2]
    for words in (
        "| api_json: valid json | 22 | 91 % | 0 % | 86 % | −4.5 [−20.0, +10.0] | – | 95 % [70 %,",
        "| summary: chrF | 22 | – | 30.1 | 55.2 | – | – | – |",
        *("dequantised 4-bit weights (Q4_1)", "the primary artefact", 'subfolder="adapter"'),
        *('from_pretrained("ann/api-writer"', "evaluation loaded these files"),
        *("| kept: train | 231 |", "took 6.7 min and cost $0.0090", "95 % intervals, paired"),
        "the model answers at once (student.chat_template_kwargs: short_form: true).",
        "Its chat template has no system turn",
    ):
        assert words in text, words


def test_a_bare_card_names_a_license_without_an_id():
    license = FACTS.license._replace(name="My Terms 2")
    bare = make_card(
        FACTS._replace(license=license), {"models": {}, "failures": {"reason": "left out"}}
    )
    data = bare.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == "my-terms-2"
    assert "has not been evaluated" in bare.text and "unknown" not in str(bare)
    assert "## Where it fails\n\nNo sample is shown: left out." in bare.text


def test_the_page_says_where_the_student_fails_and_what_it_saves():
    more = {"failures": {"worst": [WORST]}, "contamination": CONTAMINATION}
    text = plain_spaces(
        make_card(FACTS, {**SCORECARD, **more, "economics": reckon(SIXTEEN).tree()})
    )
    for words in (
        *("## Where it fails", "**api json**: not JSON", " Describe &lt;b&gt;it&lt;/b&gt;"),
        *("### What it saves", "saves $0.70 per 1,000 requests [$0."),
        *("| the teacher's price halves |", "None of the 66 items was found", "is not found."),
    ):
        assert words in text, words
    assert text.count("<pre>") == text.count("</pre>") == 3
    assert not re.search(r"(?m)^(---|```json|## not)", text)


@settings(max_examples=100, deadline=None)
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
@example("a\n---\nlicense: mit", "<b>\n## License\n\nMIT", "x\r---\ry", "\u2029\x1b[31m")
def test_hostile_values_stay_values(tmp_path_factory, name, corpus, task, reason):
    """H8"""
    config = CONFIG.model_copy(
        update={
            "corpus": CONFIG.corpus.model_copy(update={"source": corpus, "dataset": name or None}),
            "teacher": CONFIG.teacher.model_copy(update={"license": corpus}),
            "publish": CONFIG.publish.model_copy(update={"language": task}),
        }
    )
    facts = FACTS._replace(config=config, name=name)
    row = {**SCORECARD["tasks"]["api_json"], "metric": reason}
    sample = {"task": task, "asked": name, "student": corpus, "teacher": reason, "reason": reason}
    more = {"failures": {"worst": [sample]}, "funnel": {"answers": 9, "dropped": {reason: 7}}}
    card = make_card(facts, {**SCORECARD, **more, "tasks": {task: row}})
    path = tmp_path_factory.getbasetemp() / "card.md"
    card.save(path)
    loaded = ModelCard.load(path)
    data = loaded.data.to_dict()
    assert data == card.data.to_dict() and loaded.text == card.text
    assert data["license"] == "apache-2.0" and data["base_model"] == BASE
    assert data.get("datasets") == ([one_line(name) or "unknown"] if name else None)
    header = str(card).split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(header)["license"] == "apache-2.0"
    plain = make_card(FACTS, {**SCORECARD, "failures": {"worst": [WORST]}}).text
    for mark in (r"(?m)^## ", "```", r"<", r"(?m)^---"):
        assert len(re.findall(mark, loaded.text)) == len(re.findall(mark, plain))
    lines = [line for line in loaded.text.splitlines() if line.startswith("| ")]
    assert {re.sub(r"\\.", "", line).count("|") for line in lines} <= {3, 7, 9}
