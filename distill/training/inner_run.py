"""A run inside a run: a round or a trial, which shares the store and the ledger of the outer one.

It goes on where it was after a kill, as any run does, and what it asks is asked once for all runs.
"""

from collections.abc import Sequence
from pathlib import Path

from distill.generation.filters import Dropped, asked_prompts, contaminated_ids
from distill.models.devices import release_memory
from distill.reasoning import join_thought
from distill.records import Pair, Prompt, Response
from distill.responders.ask import Ask
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling
from distill.storage.files import read_records, write_records
from distill.storage.run_folder import Run

# What training.json says of a round
SUMMARY = ("steps", "best_step", "adapter_step", "tokens", "seconds", "history", "validation")
SUMMARY += ("adapter_sha256",)


class InnerRun(Run):
    """The run in `folder` below `outer`, with some other sections; what it spends enters there."""

    def __init__(self, outer: Run, folder: str, **sections: object) -> None:
        config = outer.config.model_copy(update=sections)
        alone = {"num_processes": None, "report_to": "none"}
        train = config.train.model_copy(update=alone)
        super().__init__(config.model_copy(update={"train": train}), outer.path(folder))
        self.outer, self.ledger, self.remade = outer, outer.ledger, outer.remade

    def write_dataset(self, pairs: Sequence[Pair]) -> None:
        """Write the pairs to train on, and beside them the outer run's validation."""
        write_records(self.path("dataset/train.jsonl"), pairs)
        validation = self.outer.path("dataset/validation.jsonl")
        if validation.exists():
            write_records(self.path("dataset/validation.jsonl"), read_records(validation, Pair))


def training_prompts(run: Run) -> list[Prompt]:
    """Return the prompts of the train split, but for those contaminated by held-out text.

    Those whose answer the filters dropped are included.
    """
    trained = [pair.prompt for pair in read_records(run.path("dataset/train.jsonl"), Pair)]
    prompts, rows = asked_prompts(run), read_records(run.path("dropped.jsonl"), Dropped)
    rows = [row for row in rows if row.split == "train"]  # of several reasons each has the first
    own = ((row.response_id, prompts[row.prompt_id], row.text) for row in rows)
    matches = contaminated_ids(run, own)
    more = [prompts[row.prompt_id] for row in rows if row.response_id not in matches]
    by_id = {prompt.id: prompt for prompt in [*trained, *more]}
    return [by_id[name] for name in sorted(by_id)]


def student_answers(
    run: Run,
    prompts: Sequence[Prompt],
    adapter: Path | None,
    sampling: Sampling,
    title: str,
    samples: int = 1,
    logprobs: bool = False,
) -> list[Response]:
    """Let the student with `adapter`, or the base, answer each prompt `samples` times, in order.

    Where reasoning is kept, it stands in the text, as it will be trained on. `logprobs` records
    how sure the student was of each answer.
    """
    config, student = run.config, run.config.student
    model = (student.model, student.dtype, student.revision, config.template_date)
    template = {"template": student.chat_template_kwargs, "reasoning": config.reasoning}
    responder = LocalResponder.load(*model, adapter=adapter, trust=student.trust, **template)
    responder.logprobs = logprobs
    asked = [
        Request.make(responder.origin, prompt.id, prompt.messages, sampling, sample)
        for prompt in prompts
        for sample in range(samples)
    ]
    with Ask(responder, config.store_folder() / "responses", run) as ask:
        ask.student = True
        responses = ask.responses(asked, title)
    del responder, ask
    release_memory()
    if config.reasoning == "keep":
        joined = (join_thought(r.text, r.reasoning) if r.reasoning else r.text for r in responses)
        texts = zip(responses, joined, strict=True)
        responses = [response.model_copy(update={"text": text}) for response, text in texts]
    return responses
