"""The nouns of the pipeline: frozen records, their ids (hashes of content) and their JSON form."""

import hashlib
import json
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["system", "user", "assistant"]
Stop = Literal["end", "length", "filtered", "error"]
Split = Literal["train", "validation", "heldout"]
Origin = Literal["teacher", "student"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
# Of a GPU; a CPU has none, and what has none is written as it was before there were any
DeviceName = Annotated[str, Field(exclude_if=lambda name: not name)]


def canonical(value: object) -> bytes:
    """Encode `value` as canonical JSON: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return text.encode("utf-8")


def digest(value: object) -> str:
    """Hash `value` (anything that JSON can hold) to 32 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()[:32]


class Record(BaseModel):
    """A frozen row with a strict form, which pydantic writes as one line of JSON and reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: str


class Document(Record):
    """A piece of the corpus after cleaning; `split` is None until all documents are split."""

    id: str
    text: str
    source: str
    split: Split | None = None
    meta: dict[str, Any] = {}

    @classmethod
    def make(
        cls, text: str, source: str, meta: dict[str, Any] | None = None, split: Split | None = None
    ) -> Self:
        """Build a document whose id is the hash of its text."""
        identity = digest({"text": text})
        return cls(id=identity, text=text, source=source, split=split, meta=meta or {})

    @property
    def recorded_answers(self) -> list[dict[str, str]]:
        """Return the answers that came with a prompt: `text`, and perhaps `reasoning`, `model`."""
        answers = self.meta.get("recorded_answer", [])
        return [{"text": answers}] if isinstance(answers, str) else answers

    @model_validator(mode="before")
    @classmethod
    def _split_in_meta(cls, row: Any) -> Any:
        """Read the split also where it stood before 0.1.0, in `meta`."""
        meta = row.get("meta") if isinstance(row, dict) else None
        if not isinstance(meta, dict) or "split" in row or "split" not in meta:
            return row
        return {**row, "split": meta["split"], "meta": {k: meta[k] for k in meta if k != "split"}}


class Prompt(Record):
    """What is asked: the student's view (`messages`) and, where it differs, the teacher's."""

    id: str
    messages: tuple[Message, ...]
    teacher_messages: tuple[Message, ...] | None = None
    document_id: str
    task: str
    reference: str | None = None

    @classmethod
    def make(
        cls,
        messages: tuple[Message, ...],
        document_id: str,
        task: str,
        teacher_messages: tuple[Message, ...] | None = None,
        reference: str | None = None,
    ) -> Self:
        """Build a prompt whose id is the hash of everything in it."""
        prompt = cls(
            id="",
            messages=messages,
            teacher_messages=teacher_messages or None,
            document_id=document_id,
            task=task,
            reference=reference,
        )
        return prompt.model_copy(update={"id": digest(prompt.model_dump(exclude={"id"}))})

    def asked_of_teacher(self) -> tuple[Message, ...]:
        """Return the messages that the teacher is asked."""
        return self.teacher_messages or self.messages


class Usage(Record):
    """The usage of one answer: tokens, and its share of the batch's seconds on a GPU, or a CPU."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    estimated: bool = False
    device: DeviceName = ""


class Candidate(Record):
    """A token and its log-probability; `bytes` where its text does not determine them."""

    token: str
    logprob: Annotated[float, Field(allow_inf_nan=False)]
    bytes: tuple[int, ...] | None = None


class TokenLogprob(Candidate):
    """The token at a position of an answer and its top-k alternatives, as a server lists them."""

    top: tuple[Candidate, ...] = ()


class Response(Record):
    """One answer, as it was given."""

    id: str
    request_key: str
    sample: int
    prompt_id: str
    model: str
    text: str
    reasoning: str | None = None
    stop: Stop
    usage: Usage = Usage()
    logprobs: tuple[TokenLogprob, ...] | None = None
    raw_sha256: str | None = None
    error: str | None = None
    mean_logprob: Annotated[float | None, Field(exclude_if=lambda mean: mean is None)] = None
    """Of its tokens, the end included, at temperature 1, where a local model was to record it."""

    @staticmethod
    def make_id(request_key: str, sample: int) -> str:
        """Return the id of the answer to `request_key` at sample index `sample`."""
        return digest({"request_key": request_key, "sample": sample})


class Pair(Record):
    """A row of the dataset: a prompt and its answer, after the filters, and who gave it."""

    prompt: Prompt
    response: Response
    # A wrong answer, which gives soft labels and whose tokens are not learnt
    only_signals: Annotated[bool, Field(exclude_if=lambda only: not only)] = False
    origin: Annotated[Origin, Field(exclude_if=lambda origin: origin == "teacher")] = "teacher"


class Item(Record):
    """One thing that is evaluated; items of one `cluster` (document) are not independent."""

    id: str
    task: str
    prompt: Prompt
    reference: str | None = None
    cluster: str

    @classmethod
    def make(cls, prompt: Prompt) -> Self:
        """Build the item that evaluates a held-out prompt."""
        return cls(
            id=digest({"task": prompt.task, "prompt": prompt.id}),
            task=prompt.task,
            prompt=prompt,
            reference=prompt.reference,
            cluster=prompt.document_id,
        )


class AnswerLoss(Record):
    """The loss of an answer under a model in nats, its tokens, and those that are top-1."""

    loss: float
    tokens: int
    hits: int


class Score(Record):
    """A scorer's verdict with its evidence; `value` is None only where we failed."""

    item_id: str
    model: str
    value: float | None
    answer: str | None = None
    reason: str


HEADLINE = 8  # requests at once, whose costs are those of a scorecard


class Load(Record):
    """A run of requests, so many at once: of repeated ones the middle of the last three."""

    concurrency: int
    requests: int
    usage: Usage  # of all together
    repeats: int = 1
    range: tuple[float, float] = (1.0, 1.0)  # the fastest and the slowest of the three beside it

    @property
    def pace(self) -> float:
        """Return the seconds of an output token."""
        return self.usage.seconds / self.usage.output_tokens


class Timing(Record):
    """A model timed apart from its answers: at each load, and prompts that are only prefilled."""

    requests: int = 0  # one at a time, in older runs
    output_tokens: int = 0
    seconds: float = 0.0
    read_tokens: int
    read_seconds: float
    device: DeviceName = ""
    engine: str = "distill"
    loads: tuple[Load, ...] = ()


class LedgerEntry(Record):
    """What a stage took in one go: all tokens, those that the student wrote, those of `paid`
    attempts, and those of these whose outcome is unknown, with their maximum."""

    stage: str
    started: str
    seconds: float
    input_tokens: int = 0
    output_tokens: int = 0
    student_output_tokens: Annotated[int, Field(exclude_if=lambda count: not count)] = 0
    paid_input_tokens: int = 0
    paid_output_tokens: int = 0
    dollars: Decimal | None = None
    price: str | None = None
    attempts: int = 0
    unknown: int = 0
    unknown_dollars: Decimal | None = None
    note: str = ""
