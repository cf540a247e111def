"""The sets that people use, read as they are: from a file of each to a scorecard, without a
`columns:` key.

The rows of tests/fixtures/sets are made up, in exactly the columns of the sets on the Hub:
tatsu-lab/alpaca, databricks/databricks-dolly-15k, rajpurkar/squad, ShareGPT's export, OpenAI's
fine-tuning format, TRL's dataset formats (docs/source/dataset_formats.md),
HuggingFaceH4/ultrafeedback_binarized, HuggingFaceH4/ultrachat_200k, openbmb/UltraChat,
teknium/OpenHermes-2.5, Open-Orca/OpenOrca, openai/gsm8k.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from distill.cli import main
from distill.corpus.readers import SourceRow, read_file
from distill.corpus.rows import Reading, interpret
from distill.records import Document, Prompt, Response
from distill.storage.files import read_json, read_records
from tests.support.tiny import make_tiny

SETS = Path(__file__).parents[1] / "fixtures/sets"
READ_AS = {
    "alpaca": "8 rows as Alpaca: instruction + input → prompt, output → recorded answer; "
    "column `text` not used",
    "dolly": "8 rows as Dolly: instruction + context → prompt, response → recorded answer; "
    "column `category` not used",
    "gsm8k": "8 rows as GSM8K: question → prompt, answer → recorded answer, after #### reference",
    "open_orca": "8 rows as Open-Orca: question → prompt, response → recorded answer, "
    "system_prompt → system turn",
    "openai_messages": "8 rows as OpenAI messages: messages → prompt and recorded answer",
    "openhermes": "8 rows as OpenHermes: conversations → prompt and recorded answer, "
    "system_prompt → system turn; "
    "columns `skip_prompt_formatting`, `category`, `source` not used",
    "preference": "8 rows as preference rows: prompt → prompt, chosen → recorded answer; "
    "column `rejected` not used",
    "preference_conversations": "8 rows as preference rows: prompt → prompt, "
    "chosen → recorded answer; "
    "columns `prompt_id`, `rejected`, `score_chosen`, `score_rejected` not used",
    "sharegpt": "8 rows as ShareGPT: conversations → prompt and recorded answer",
    "squad": "8 rows as SQuAD: context + question → prompt, answers → recorded answer; "
    "column `title` not used",
    "trl_conversational": "8 rows as TRL prompt/completion: prompt → conversation, "
    "completion → recorded answer",
    "trl_prompt_completion": "8 rows as TRL prompt/completion: prompt → prompt, "
    "completion → recorded answer",
    "ultrachat": "8 rows as UltraChat: messages → prompt and recorded answer; "
    "columns `prompt`, `prompt_id` not used",
    "ultrachat_data": "8 rows as UltraChat's list form: data → prompt and recorded answer",
}


SECOND = {  # of each: the roles, the last user turn's beginning and end, the reference
    "alpaca": ("user", "Describe the", "a child.", "Think of a slow river of ice"),
    "dolly": ("user", "Given this passage", "12 kinds.", "There are 12 kinds of glacier."),
    "gsm8k": ("user", "Mara has 12 pictures", "she now?", "17"),
    "open_orca": ("system user", "Q: How would 12", "A:", "All 12 would lift"),
    "openai_messages": ("system user", "Name one use", "a glacier.", None),
    "openhermes": ("system user", "Spell glacier", "backwards.", None),
    "preference": ("user", "Sell me a", "12 coins.", "This glacier is worth"),
    "preference_conversations": ("user", "Who invented", "glacier?", "Nobody knows who"),
    "sharegpt": ("user assistant user", "And what costs", "coins there?", None),
    "squad": ("user", "In the year 1812", "first see the glacier?", "1812"),
    "trl_conversational": ("user", "Is the glacier", "12 years?", "Yes, the glacier has"),
    "trl_prompt_completion": ("user", "The glacier in one", "line is", "a slow river of ice"),
    "ultrachat": ("user assistant user", "Shorter", "please.", None),
    "ultrachat_data": ("user", "Where would I", "a glacier?", None),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in SETS.iterdir()))
def test_a2_a3_every_set_is_read_as_it_is(name):
    """A2, A3: each column finds its place, and one line says so."""
    reading, documents = Reading(), list[Document]()
    for row in read_file(SETS / f"{name}.jsonl", name):
        assert isinstance(row, SourceRow)
        documents.append(interpret(row.value, row.where, reading=reading))
    assert reading.lines() == [READ_AS[name]]
    assert len({document.id for document in documents}) == 8
    second = documents[1]
    roles, first, last, reference = SECOND[name]
    assert " ".join(turn["role"] for turn in second.meta["messages"]) == roles
    turn, right = second.meta["messages"][-1]["content"], second.meta.get("reference")
    assert turn.startswith(first) and turn.endswith(last)
    assert right == reference or str(right).startswith(reference)
    (answer,) = second.recorded_answers
    assert right is None or right in answer["text"]


@pytest.mark.slow
def test_from_the_files_of_all_sets_to_a_scorecard_without_columns(tmp_path, capsys):
    """A2, A3, A7: all sets in one folder, their ids side by side."""
    make_tiny(tmp_path / "student", hidden=16)
    (tmp_path / "c.yaml").write_text(
        f"name: sets\nruns: {tmp_path}/runs\n"
        f"corpus: {{path: {SETS}, split: {{validation: 7, heldout: 0.2}}}}\n"
        "teacher: {kind: recorded, model: somebody/one, license: CC0-1.0, max_new_tokens: 8}\n"
        f"student: {{model: {tmp_path}/student, dtype: float32}}\n"
        "train: {max_steps: 2, tokens_per_step: 2048, max_length: 1024, lora: {r: 2}}\n"
        "evaluation: {bootstrap_samples: 100, max_new_tokens: 4}\n"
    )
    assert main(["run", str(tmp_path / "c.yaml")]) == 0
    said, run = " ".join(capsys.readouterr().err.split()), tmp_path / "runs/sets"
    for name in ("Alpaca", "Dolly", "SQuAD", "ShareGPT", "OpenAI messages", "preference rows"):
        assert f" rows as {name}: " in said
    assert said.count("prompts: for example: ") == 3
    prompts = {prompt.id: prompt for prompt in read_records(run / "prompts.jsonl", Prompt)}
    documents = {d.id: d for d in read_records(run / "documents.jsonl", Document)}
    files = Counter(documents[p.document_id].source.partition(":")[0] for p in prompts.values())
    assert files.keys() == {path.name for path in SETS.iterdir()}
    for response in read_records(run / "responses.jsonl", Response):
        document = documents[prompts[response.prompt_id].document_id]
        assert response.text == document.recorded_answers[0]["text"]
    assert read_json(run / "scorecard.json")
    assert any(p.reference == "17" for p in prompts.values())
    trained = [json.loads(line) for line in (run / "dataset/train.jsonl").open()]
    assert len(trained) > 60
