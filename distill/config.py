"""The experiment's configuration: a strict tree of keys, each with meaning, default and range.

The text below a key says what it does. `distill.config_file` reads a tree from YAML. Config reaches
a stage's `main` and stops there.
"""

import difflib
import ipaddress
import math
import re
import socket
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, to_jsonable_python

from distill.renamed_keys import RENAMED
from distill.secret_patterns import NAMES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Weight = Annotated[float, Field(ge=0)]
GREEDY = "n above 1 needs a temperature above 0: greedy answers are all the same"
SOFT = ("forward_kl", "reverse_kl", "jsd", "skew_kl")


class Section(BaseModel):
    """A part of the tree: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def plain_path(value: Path) -> Path:
    """Refuse a path that no file system would take."""
    if any(len(part.encode()) > 255 for part in value.parts) or len(str(value)) > 4000:
        raise ValueError("the path is too long")
    return value


def plain_revision(value: str) -> str:
    """Accept a branch, tag or commit."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}", value) or ".." in value:
        raise ValueError("a revision is a branch, a tag or a commit")
    return value


File = Annotated[Path, AfterValidator(plain_path)]
Revision = Annotated[str, AfterValidator(plain_revision)]


def checked_model(value: str) -> str:
    """Accept a Hub id, a name of models.yaml or a folder (`./x`, `/x`); refuse traversal."""
    if value.startswith(("./", "/")) and "\0" not in value and ".." not in Path(value).parts:
        return value
    if not MODEL.fullmatch(value):
        raise ValueError("a model is NAME, OWNER/NAME, or a folder written as ./FOLDER or /FOLDER")
    return value


SERVED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,199}")  # what servers call their models
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


def checked_url(value: str, allow_insecure: bool = False) -> str:
    """Accept an endpoint's address: https, or http here (anywhere with `allow_insecure`)."""
    try:
        parts = urlsplit(value)
        host, _ = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ValueError("the address cannot be read") from None
    if parts.scheme not in ("http", "https") or not host or not value.isprintable():
        raise ValueError("an address is https://HOST/v1, or http://localhost:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("an address holds no name, key, query or fragment")
    address = _ip(host)
    if host == "metadata.google.internal" or (address and _is_metadata(address)):
        raise ValueError("the address is that of a cloud's metadata service")
    local = host == "localhost" or bool(address and address.is_loopback)
    if parts.scheme == "http" and not local and not allow_insecure:
        raise ValueError("http is for this machine; use https, or set allow_insecure: true")
    return value.rstrip("/")


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _ip(host: str) -> Address | None:
    """Return a host as an IP address, also one written as a number or in octal; None for a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(found, "ipv4_mapped", None) or found


def _is_metadata(address: Address) -> bool:
    """Tell whether clouds give out keys at an address: link-local, or AWS's in IPv6."""
    return address.is_link_local or str(address) in ("fd00:ec2::254", "100.100.100.200")


class Chunk(Section):
    """How long documents are cut into pieces, at the ends of paragraphs."""

    max_chars: Positive = 6000
    """Characters of a piece at most. Lower it where passage and answer do not fit the student's
    context."""
    overlap_chars: Count = 200
    """Characters of the end of a piece that the next one begins with again."""
    min_chars: Count = 40
    """Documents of fewer characters are left out. Lower it for a corpus of short texts."""

    @model_validator(mode="after")
    def _overlap_is_smaller(self) -> "Chunk":
        if self.overlap_chars * 2 > self.max_chars:
            raise ValueError("overlap_chars must be at most half of max_chars")
        return self


class SplitSizes(Section):
    """How many documents are not trained on; documents are split before any prompt is made."""

    validation: Annotated[float, Field(ge=0)] = 0.05
    """Documents that choose the best checkpoint: 1 and more is a count, below 1 a share of all
    documents."""
    heldout: Annotated[float, Field(ge=0)] = 0.1
    """Documents for the evaluation alone, written like `validation`."""


class Columns(Section):
    """Names of the columns of rows, where they are not the usual ones."""

    text: str | None = None
    """Column with the text of a document; else `text`, `content`, `document`, `passage` or
    `body`."""
    id: str | None = None
    """Column with an id of yours, which must be unique; else `id`, where there is one."""
    prompt: str | None = None
    """Column with the prompt or the conversation; else `messages`, `conversations`, `prompt`,
    `question` or `instruction`."""
    reference: str | None = None
    """Column with the right answer; else `reference`, `answer`, `completion`, `response` or
    `output`."""


class Corpus(Section):
    """Where the documents or the prompts come from, and how they are cleaned."""

    source: Literal["auto", "python-docs"] = "auto"
    """`auto` reads `path` or `dataset`; `python-docs` takes the documentation of the Python that
    runs this."""
    path: File | None = None
    """File or folder of documents or rows: txt, md, rst, html, jsonl, csv, tsv or parquet. Wins
    over `dataset`."""
    dataset: str | None = None
    """Dataset of the Hub as OWNER/NAME, or a folder that `datasets` saved, as ./FOLDER."""
    dataset_config: str | None = None
    """Configuration of the dataset, for datasets that have several (GSM8K: `main`)."""
    dataset_split: str = "train"
    """Split of the dataset that is read."""
    format: Literal["auto", "documents", "prompts"] = "auto"
    """Whether rows are documents, or prompts that exist already; `auto` tells by their columns."""
    columns: Columns = Columns()
    """Names of the columns, where they are not the usual ones."""
    reference_pattern: str | None = None
    r"""Regular expression whose one group takes the reference from an answer (GSM8K:
    `####\s*(.+)$`)."""
    limit: Positive | None = None
    """Documents kept at most, without repeats, chosen by content and seed. Set it for a first
    try."""
    max_bad_fraction: Fraction = 0.01
    """Share of unreadable rows above which the stage stops. Raise it for a corpus known to be
    dirty."""
    chunk: Chunk = Chunk()
    """How long documents are cut into pieces."""
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.85
    """Documents that share at least this part of their word 5-grams (Jaccard) with an earlier one
    are left out; null keeps all but exact repeats."""
    split: SplitSizes = SplitSizes()
    """How many documents are for validation and held out."""
    private_text: Literal["mask", "drop", "keep"] = "mask"
    """What happens to e-mail addresses, phone and card numbers and keys: `mask` replaces them,
    `drop` leaves their documents out, `keep` keeps them, and then no samples of answers are
    published."""

    @field_validator("dataset")
    @classmethod
    def _dataset_name(cls, value: str | None) -> str | None:
        return value if value is None else checked_model(value)

    @field_validator("reference_pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        try:
            if value is not None and regex.compile(value).groups != 1:
                raise ValueError("the pattern needs exactly one group")
        except regex.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "Corpus":
        if self.source == "auto" and self.path is None and self.dataset is None:
            raise ValueError("needs path, dataset, or source: python-docs")
        return self


class Questions(Section):
    """Questions that the teacher writes about each document."""

    kinds: tuple[str, ...] = ("factual", "explain", "apply")
    """Kinds of questions: factual, explain, apply, compare, consequence."""
    per_document: Positive = 3
    """Questions asked for each document, spread over the kinds."""
    max_new_tokens: Positive = 256
    """Tokens of a reply that lists questions, at most."""
    answer_with_passage: bool = True
    """Whether the teacher sees the document when it answers its questions."""
    student_sees_passage: bool = False
    """Whether the student sees the document, in training and when it is evaluated."""


class Prompts(Section):
    """Which tasks are asked of which documents."""

    tasks: tuple[str, ...] = ()
    """Names of tasks in configs/tasks, or paths of your own. May be empty where the corpus holds
    prompts already."""
    per_document: Literal["each", "rotate"] = "each"
    """`each` asks every task of every document; `rotate` one task a document, the tasks in turn."""
    train: Positive | None = None
    """Prompts of the train split at most; null takes all."""
    validation: Count | None = None
    """Prompts of the validation split at most; null takes all."""
    heldout: Count | None = None
    """Held-out prompts at most; null takes all. More of them make the intervals narrower."""
    questions: Questions | None = None
    """Lets the teacher write questions about each document; null asks for none."""


class Teacher(Section):
    """Who answers, and how: the keys of every kind, and what a kind says of itself.

    The rest of the package asks these attributes, and never for the name of a kind.
    """

    model_config = ConfigDict(extra="allow")  # looked at below: keys of other kinds, unknown keys

    paid: ClassVar[bool] = False
    """Whether an answer costs money."""
    runs_here: ClassVar[bool] = False
    """Whether its weights are loaded on this machine."""
    makes_answers: ClassVar[bool] = False
    """Whether it can be asked anew; else it has what answers it has."""
    answers_anything: ClassVar[bool] = True
    """Whether it has answers to more than the prompts that came with the corpus."""
    logprobs: ClassVar[Literal["full", "listed"] | None] = None
    """What it tells of the next token: each token's probability, a list of the top ones,
    nothing."""
    under_terms: ClassVar[bool] = True
    """Whether its answers are a model's, whose terms apply."""
    shaping: ClassVar[tuple[str, ...]] = ()
    """Its own keys that shape its answers."""

    kind: str
    model: str = ""
    """Model as NAME of configs/models.yaml, Hub id or ./FOLDER; of an endpoint, the server's name
    for it. Needed for `local` and `endpoint`; else the model whose terms apply to the answers."""
    revision: Revision | None = None
    """Branch, tag or commit on the Hub; null takes the one in configs/models.yaml, else the
    newest."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the most probable tokens that hold this share of the mass are sampled
    from."""
    max_new_tokens: Positive = 512
    """Tokens of an answer at most. Raise it where `dropped.jsonl` lists many answers as
    truncated."""
    n: Positive = 1
    """Samples of each prompt; above 1 it needs a temperature."""
    reasoning: Literal["drop", "keep"] = "drop"
    """Whether the teacher's reasoning stays before its answer, in a think block, and is trained
    on."""
    license: str | None = None
    """License of the answers, for the model card; with it recorded answers need no
    `terms.basis`."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Return the addresses at which it is asked; the first names it."""
        return ()

    @property
    def budget(self) -> Decimal | None:
        """Return the dollars that may be spent on it."""
        return None

    @property
    def stated_dollars(self) -> Decimal | None:
        """Return what all its answers cost, where the user states that."""
        return None

    @property
    def cost_unstated(self) -> bool:
        """Tell whether only the user could say what its answers cost, and does not."""
        return False

    @property
    def limits_answers(self) -> bool:
        """Tell whether an answer has a maximum that is enforced."""
        return True

    @property
    def lists_logprobs(self) -> bool:
        """Tell whether log-probabilities come with the answers."""
        return False

    def least_seconds(self, requests: float, tokens: float) -> float:
        """Return how long limits of the rate make so many requests and tokens take."""
        return 0.0

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        return value and checked_model(value)

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> Self:
        """Forget what a resolved config says of other kinds; what was set there would do
        nothing."""
        extra, foreign = self.__pydantic_extra__ or {}, dict[str, str]()
        for key, value in extra.items():
            name = RENAMED.get(key, key)
            owners = [kind for kind in TEACHERS if name in kind.model_fields]
            if not owners or name in type(self).model_fields:  # there under both names
                raise PydanticCustomError("extra_forbidden", "unknown key", {"key": key})
            field = owners[0].model_fields[name]
            default = None if field.is_required() else to_jsonable_python(field.default)
            if value is not None and value != default:
                foreign[key] = str(owners[0].model_fields["kind"].default)
        if foreign:
            (key, kind), *others = foreign.items()
            more = f"; so is {', '.join(name for name, _ in others)}" if others else ""
            message = f"is a key of kind {kind}, and this teacher is of kind {self.kind}{more}"
            raise PydanticCustomError("other_kind", "{message}", {"key": key, "message": message})
        extra.clear()
        return self


class LocalTeacher(Teacher):
    """A model that is loaded here."""

    runs_here = makes_answers = True
    logprobs = "full"
    shaping = ("dtype", "max_batch_size")

    kind: Literal["local"] = "local"
    """`local` loads a model here, `endpoint` asks a server, `recorded` takes the answers in the
    corpus, `canned` those in a file, `python` calls a function. Below, the keys of one kind stand
    behind those of all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; `auto` takes bfloat16 where the hardware computes in it."""
    max_batch_size: Positive | None = None
    """Sequences generated at once; null takes what fits in memory. Lower it where memory runs
    out."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.model:
            raise ValueError("needs model")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(GREEDY)
        return self


class EndpointTeacher(Teacher):
    """A server that is asked, and paid."""

    paid = makes_answers = True
    logprobs = "listed"

    kind: Literal["endpoint"] = "endpoint"
    """`endpoint`: a server is asked."""
    base_url: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=100)]
    """Address of the API as https://HOST/v1, or a list of replicas that share the work; the first
    names the endpoint."""
    allow_insecure: bool = False
    """Allows http to another machine. Only for a network that you trust."""
    api: Literal["chat", "completions"] = "chat"
    """`chat` posts messages to /chat/completions, `completions` plain text to /completions."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; the key itself stands in no file."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of an answer. Newer models of OpenAI take
    `max_completion_tokens`."""
    omit: tuple[Literal["temperature", "max_tokens"], ...] = ()
    """Fields that are not sent, for servers that refuse them. Without max_tokens no budget can be
    kept."""
    extra_body: dict[str, Any] = {}
    """Further fields of each request, for instance {logprobs: true, top_logprobs: 20}."""
    strict_model: bool = False
    """Stops where the server names another model than `model`, instead of warning."""
    budget_dollars: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] | None = None
    """Dollars that may be spent under the run's name; no request is sent that could exceed it.
    Needs a price in configs/prices.yaml or `evaluation.prices`."""
    concurrency: Annotated[int, Field(gt=0, le=4096)] = 16
    """Requests in flight at once, over all addresses."""
    requests_per_minute: Positive | None = None
    """Rate limit of requests, where the provider states one."""
    tokens_per_minute: Positive | None = None
    """Rate limit of tokens, prompts and answers together, where the provider states one."""
    connect_timeout: Seconds = 10
    """Seconds to open a connection."""
    read_timeout: Seconds = 300
    """Seconds without a byte from the server. Raise it for long answers that come in one piece."""
    total_timeout: Seconds = 600
    """Seconds that a request may take in all."""
    drain_timeout: Seconds = 60
    """Seconds to wait for answers in flight when the run is stopped."""
    max_pause: Seconds = 300
    """Longest wait in seconds that a server may ask for (Retry-After); a longer one stops the
    run."""
    initial_backoff: Seconds = 0.5
    """Seconds before the first retry; each further one waits longer, with jitter."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 6
    """Retries of a request that failed for a reason that may pass."""
    max_consecutive_failures: Positive = 100
    """Failures in a row, over all requests, after which the run stops."""
    max_body_bytes: Annotated[int, Field(ge=1000, le=10**9)] = 16_000_000
    """Bytes of a reply at most; a longer one counts as failed."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Return the addresses of the endpoint; the first names it."""
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return tuple(url.rstrip("/") for url in urls)

    @property
    def budget(self) -> Decimal | None:
        """Return the dollars that may be spent on it."""
        return self.budget_dollars

    @property
    def limits_answers(self) -> bool:
        """Tell whether an answer has a maximum that is enforced."""
        return "max_tokens" not in self.omit

    @property
    def lists_logprobs(self) -> bool:
        """Tell whether log-probabilities come with the answers."""
        return bool(self.extra_body.get("logprobs"))

    def least_seconds(self, requests: float, tokens: float) -> float:
        """Return how long limits of the rate make so many requests and tokens take."""
        by_count = requests / (self.requests_per_minute or math.inf)
        return 60 * max(by_count, tokens / (self.tokens_per_minute or math.inf))

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        served = SERVED.fullmatch(value) and ".." not in value
        return value if served or not value else checked_model(value)

    @field_validator("extra_body")
    @classmethod
    def _no_field_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := value.keys() & {"model", "messages", "prompt", "n", "stream"}:
            raise ValueError(f"{min(ours)} is ours to set")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, value: str | None) -> str | None:
        if value is not None and not VARIABLE.fullmatch(value):
            raise ValueError("names an environment variable, and never holds a key")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.model:
            raise ValueError("needs model")
        for url in self.base_urls:
            checked_url(url, self.allow_insecure)
        if self.n > 1 and self.temperature == 0 and "temperature" not in self.omit:
            raise ValueError(GREEDY)
        return self


class CannedTeacher(Teacher):
    """Answers that stand in a file."""

    under_terms = False
    shaping = ("answers",)

    kind: Literal["canned"] = "canned"
    """`canned`: the answers stand in a file."""
    answers: File
    """File of JSON lines, {"prompt": last user turn, "answer": text}."""


class StatedCost(Teacher):
    """Answers whose cost only the user knows."""

    dollars: Decimal | None = None
    """What all answers cost, in dollars, for the report; null is unknown."""

    @property
    def stated_dollars(self) -> Decimal | None:
        """Return what all its answers cost, where the user states that."""
        return self.dollars

    @property
    def cost_unstated(self) -> bool:
        """Tell whether only the user could say what its answers cost, and does not."""
        return self.dollars is None


class RecordedTeacher(StatedCost):
    """The answers that came with the corpus."""

    answers_anything = False
    shaping = ("dollars",)

    kind: Literal["recorded"] = "recorded"
    """`recorded`: the answers came with the corpus."""


class PythonTeacher(StatedCost):
    """A function of the program that calls `distill.run`."""

    makes_answers = True
    shaping = ("responder",)

    kind: Literal["python"] = "python"
    """`python`: a function answers that was given to `distill.run`."""
    responder: str
    """Name of the function in `distill.run(..., responders={name: function})`."""


TEACHERS: tuple[type[Teacher], ...] = (
    LocalTeacher,
    EndpointTeacher,
    CannedTeacher,
    RecordedTeacher,
    PythonTeacher,
)


def _kind_of(value: Any) -> str:
    """Return the kind of a teacher, read or still to be read; without one it is local."""
    kind = value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", "")
    return kind if isinstance(kind, str) else ""


def _by_kind(*kinds: str) -> Discriminator:
    return Discriminator(
        _kind_of,
        custom_error_type="unknown_kind",
        custom_error_message=f"is one of {', '.join(kinds)}",
    )


Local = Annotated[LocalTeacher, Tag("local")]
Endpoint = Annotated[EndpointTeacher, Tag("endpoint")]
Canned = Annotated[CannedTeacher, Tag("canned")]
Recorded = Annotated[RecordedTeacher, Tag("recorded")]
Python = Annotated[PythonTeacher, Tag("python")]
AnyTeacher = Annotated[
    Local | Endpoint | Canned | Recorded | Python,
    _by_kind("local", "endpoint", "canned", "recorded", "python"),
]
AnyJudge = Annotated[
    Local | Endpoint | Canned | Python, _by_kind("local", "endpoint", "canned", "python")
]


class Signals(Section):
    """What is stored of the teacher's token distributions, for the losses that need them."""

    method: Literal["nucleus", "sampled"] = "nucleus"
    """`nucleus` stores the most probable ids; `sampled` draws from the distribution, which is
    unbiased on text that is not the teacher's own, but for `ce` and `forward_kl` at temperature 1
    alone."""
    samples: Annotated[int, Field(ge=1, le=255)] = 50
    """Samples a token, of method `sampled`."""
    p: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Probability mass that the stored ids of a token hold, of method `nucleus`."""
    k: Annotated[int, Field(ge=1, le=1024)] = 64
    """Ids stored for a token at most, of method `nucleus`. Servers often list 20 at most."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] = ()
    """Further temperatures at which distributions are stored; `train.loss.temperature` is 1 or one
    of these."""
    model: str | None = None
    """Local model that reads the answers in the teacher's place: NAME, Hub id or ./FOLDER."""
    revision: Revision | None = None
    """Branch, tag or commit of `model`, or of `tokenizer`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights of `model` in memory."""
    endpoint: EndpointTeacher | None = None
    """Server that reads the answers in the teacher's place and returns prompt_logprobs, as vLLM
    does: keys as in `teacher`, with kind: endpoint."""
    from_answers: bool = False
    """Takes the top log-probabilities that came with the endpoint's answers: no second request.
    Needs them in `teacher.extra_body`."""
    tokenizer: str | None = None
    """Model whose tokenizer and chat template are the server's, where they are not the
    student's."""

    @field_validator("model", "tokenizer")
    @classmethod
    def _model_name(cls, value: str | None) -> str | None:
        return value and checked_model(value)

    @model_validator(mode="after")
    def _one_reader(self) -> "Signals":
        if sum((bool(self.endpoint), bool(self.model), self.from_answers)) > 1:
            raise ValueError("either model reads the answers, or endpoint, or from_answers is true")
        return self

    @model_validator(mode="after")
    def _no_tails(self) -> "Signals":
        if self.method == "sampled" and self.temperatures:
            raise ValueError("method sampled is for temperature 1 only: leave temperatures out")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Return the settings that shape what is kept."""
        sampled = {"method": self.method, "samples": self.samples}
        nucleus = {"p": self.p, "k": self.k, "temperatures": list(self.temperatures)}
        return sampled if self.method == "sampled" else nucleus


class Filters(Section):
    """Which answers are dropped before training; dropped.jsonl holds each with its reason."""

    truncated: bool = True
    """Drops answers that reached their length limit."""
    empty: bool = True
    """Drops answers without text."""
    refusal: bool = True
    """Drops answers that begin by declining."""
    repetition: bool = True
    """Drops answers that repeat themselves over and over."""
    wrong_format: bool = True
    """Drops answers without the form that their task asks for (JSON, code)."""
    failed_checker: bool = True
    """Drops answers that the checker of their task rejects."""
    max_answer_tokens: Positive | None = None
    """Drops answers of more tokens, as counted by the teacher; null keeps long ones."""
    python: tuple[str, ...] = ()
    """Names of filters of yours that apply after these; `distill.run(..., filters=[...])` fills it
    in."""


class Trust(NamedTuple):
    """What a model's files may be beside safetensors: pickles, and code of the model's author."""

    pickle: bool = False
    code: bool = False


SAFE = Trust()


class Student(Section):
    """The small model that learns."""

    model: str
    """Model as NAME of configs/models.yaml, Hub id or ./FOLDER."""
    revision: Revision | None = None
    """Branch, tag or commit on the Hub; null takes the one in configs/models.yaml, else the
    newest."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; `auto` takes bfloat16 where the hardware computes in it."""
    load_in_4bit: bool = False
    """Loads the frozen weights in 4 bits (QLoRA, needs a CUDA GPU). For a model that does not fit
    otherwise."""
    allow_pickle: bool = False
    """Allows weights in pickle files, which can run code. Convert them to safetensors instead."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model. Read it first."""

    @property
    def trust(self) -> Trust:
        """Return what the files of the model are allowed to be."""
        return Trust(self.allow_pickle, self.trust_remote_code)

    _model_name = field_validator("model")(classmethod(lambda cls, value: checked_model(value)))


class Lora(Section):
    """The adapter, in PEFT's words."""

    r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapter; more learns more and takes more memory."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the adapter, which is alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, against overfitting."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: all-linear, a regular expression, or a list of names."""


class Loss(Section):
    """Weights of the parts of the loss; all but `ce` need the teacher's token distributions."""

    ce: Weight = 1.0
    """Weight of the cross-entropy with the answer's tokens; weights are used as given, and need not
    add up to 1."""
    forward_kl: Weight = 0.0
    """Weight of KL(teacher || student), which covers all that the teacher would say."""
    reverse_kl: Weight = 0.0
    """Weight of KL(student || teacher), which keeps to what the teacher is sure of."""
    jsd: Weight = 0.0
    """Weight of the generalised Jensen-Shannon divergence, between the two."""
    skew_kl: Weight = 0.0
    """Weight of the skew KL: KL from the teacher to a mixture of both."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Weight of the teacher in the mixture of `skew_kl`."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Temperature of teacher and student in all parts but `ce`."""
    teacher: Literal["cached", "live"] = "cached"
    """`cached` reads distributions that were stored once; `live` keeps the teacher in memory and
    needs no disk."""

    @property
    def soft(self) -> dict[str, float]:
        """Return the parts that need the teacher's distributions, with their weights."""
        parts = {name: getattr(self, name) for name in SOFT}
        return {name: weight for name, weight in parts.items() if weight}

    @property
    def parts(self) -> dict[str, float]:
        """Return all parts that have a weight, the cross-entropy first."""
        return {**({"ce": self.ce} if self.ce else {}), **self.soft}

    @model_validator(mode="after")
    def _something(self) -> "Loss":
        if not self.ce and not self.soft:
            raise ValueError("gives every part the weight 0")
        return self


class Train(Section):
    """The training loop."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the adapter's initial weights and of the order of samples; null takes the run's
    seed."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate, after the warm-up."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = 2
    """Passes over the training samples."""
    max_steps: Positive | None = None
    """Optimizer steps at most; null trains for all epochs."""
    tokens_per_step: Positive = 2048
    """Tokens of an optimizer step, prompts included, over all processes together."""
    micro_batch_tokens: Positive | None = None
    """Tokens of one forward pass; null takes 2,560. Lower it where memory runs out: the result is
    the same."""
    max_length: Positive = 2048
    """Tokens of a sample at most; longer ones are left out, counted and named."""
    packing: bool = True
    """Puts several samples into one row, each attending to itself alone. Faster, and the same
    result."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up of the learning rate: below 1 a share of all steps, else a count."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    lora: Lora = Lora()
    """The adapter that is trained."""
    loss: Loss = Loss()
    """The loss and its weights."""
    bf16: bool | Literal["auto"] = "auto"
    """Whether the forward pass computes in bfloat16; `auto` goes by `student.dtype`. Adapter and
    optimizer are float32."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass, which takes less memory and more time."""
    eval_steps: Positive | None = 50
    """Steps from one validation to the next; null validates at the end alone."""
    save_steps: Positive | None = 50
    """Steps from one checkpoint to the next; null saves at the end alone."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints that are kept."""
    load_best_model_at_end: bool = True
    """Takes the adapter of the best validation loss, not of the last step."""
    early_stopping_patience: Positive | None = None
    """Validations in a row without a better loss after which training stops; null never stops
    early."""
    logging_steps: Positive = 1
    """Steps from one logged loss to the next."""
    num_processes: Positive | None = None
    """Processes that training must have, or it stops; null takes as many as the launcher starts."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Tracker that gets the losses; needs `pip install 'distill[tracking]'`."""


class OnPolicy(Section):
    """Rounds after training in which the student learns from the teacher on its own answers."""

    rounds: Annotated[int, Field(ge=0, le=100)] = 0
    """Rounds; 0 does none. Needs a local teacher that shares the student's tokenizer."""
    prompts: Positive = 256
    """Training prompts that the student answers in a round."""
    max_new_tokens: Positive = 128
    """Tokens of an answer of the student, at most."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature of the student."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling of the student."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = "jsd"
    """Divergence from the teacher that is trained on; `train.loss` gives beta, alpha and
    temperature."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak learning rate of a round, which is one epoch; the rest is as in `train`."""


class Evaluation(Section):
    """How models are compared, and at what prices."""

    suites: tuple[Annotated[str, Field(min_length=1, max_length=4000)], ...] = ()
    """Further questions: names in eval/suites, or paths of your own."""
    max_new_tokens: Positive | None = None
    """Tokens of an answer to a held-out prompt, at most; null takes `teacher.max_new_tokens`."""
    max_batch_size: Positive | None = None
    """Sequences generated at once; null takes what fits in memory."""
    bootstrap_samples: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    """Bootstrap samples from which an interval is read."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence level of the intervals."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Margin of non-inferiority, as a share of the items: how much worse than the teacher still
    counts as equal."""
    machine: str | None = None
    """Row of the price table that prices the time of local models; null leaves it without a
    price."""
    prices: File | None = None
    """Price table of your own in the form of configs/prices.yaml; its rows win."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a paid hour in which the student's machine works."""
    requests_per_month: Positive = 100_000
    """Requests a month for which savings are stated."""
    teacher_price: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Model of the price table whose price stands in for the teacher's: what the student would save
    there."""
    judge: AnyJudge | None = None
    """Model that compares answers in pairs, keys as in `teacher`; used only if it passes its
    probes. null uses none."""


class Terms(Section):
    """What allows training on the teacher's answers, where configs/terms.yaml does not."""

    basis: Annotated[str, Field(min_length=3, max_length=500)] | None = None
    """What allows it, in your words (agreement, date); stands on the model card."""
    agreement: File | None = None
    """Copy of the license agreement that a release must carry, where the terms ask for one."""


class Publish(Section):
    """What the release is called, and its license."""

    model_name: str | None = None
    """Name of the release as NAME or OWNER/NAME; null takes the repository's, else the run's."""
    license: str | None = None
    """SPDX id of the release's license; null takes that of the base model."""
    language: str = "en"
    """Language of the answers, as a BCP 47 code, for the model card."""
    allow_secrets: tuple[str, ...] = ()
    """What looks like a secret and is none, in the release or in this config: names of forms
    (sk-key), or a single text by the first 8 to 64 digits of its SHA-256, as the message
    names it (sha256:0123456789ab)."""

    @field_validator("model_name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and not MODEL.fullmatch(value):
            raise ValueError("a model's name is NAME or OWNER/NAME")
        return value

    @field_validator("allow_secrets")
    @classmethod
    def _known_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in NAMES and not re.fullmatch("(?:sha256:)?[0-9a-f]{8,64}", name):
                near = difflib.get_close_matches(name, NAMES, 1)
                hint = f"did you mean {near[0]}?" if near else "a message shows which"
                raise ValueError(f"neither the name of a secret's form nor a SHA-256: {hint}")
        return value


class Config(Section):
    """One experiment."""

    name: str
    """Name of the run, and of its folder below `runs`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the split, of samples and of training."""
    runs: File = Path("runs")
    """Folder of all runs."""
    store: File | None = None
    """Folder of the answers and soft labels that all runs share; null takes .store below `runs`."""
    template_date: str = "2026-01-01"
    """Date that chat templates print, so that a run repeats on another day."""
    corpus: Corpus
    """Where the documents or prompts come from."""
    prompts: Prompts = Prompts()
    """Which tasks are asked of which documents."""
    teacher: AnyTeacher
    """Who answers, and how."""
    terms: Terms = Terms()
    """What allows training on the answers."""
    filters: Filters = Filters()
    """Which answers are dropped before training."""
    signals: Signals = Signals()
    """What is stored of the teacher's token distributions."""
    student: Student
    """The small model that learns."""
    train: Train = Train()
    """The training loop."""
    on_policy: OnPolicy = OnPolicy()
    """Rounds after training in which the student learns on its own answers."""
    evaluation: Evaluation = Evaluation()
    """How models are compared, and at what prices."""
    publish: Publish = Publish()
    """What the release is called, and its license."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError(
                "a name is letters, digits, '.', '_' and '-', and begins with a letter or digit"
            )
        return value

    @field_validator("template_date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("a date is written YYYY-MM-DD") from None

    @property
    def captures(self) -> bool:
        """Tell whether the teacher's distributions are captured before training."""
        return bool(self.train.loss.soft) and self.train.loss.teacher == "cached"

    @property
    def distributions(self) -> bool:
        """Tell whether any stage needs the teacher's distributions, cached or live."""
        return bool(self.train.loss.soft) or self.on_policy.rounds > 0

    @property
    def train_seed(self) -> int:
        """Return the seed of the training: its own, else the run's."""
        return self.seed if self.train.seed is None else self.train.seed

    @model_validator(mode="after")
    def _sampled(self) -> "Config":
        loss, own = self.train.loss, self.on_policy
        parts = [*(loss.soft if self.captures else ()), *([own.divergence] if own.rounds else ())]
        other = [name for name in parts if name != "forward_kl"]
        if self.signals.method == "sampled" and (other or (parts and loss.temperature != 1)):
            what = other[0] if other else f"temperature {loss.temperature:g}"
            raise ValueError(
                "signals.method sampled is right for ce and forward_kl at temperature 1 only, "
                f"not for {what}"
            )
        return self

    @model_validator(mode="after")
    def _captured_from_a_server(self) -> "Config":
        if not self.distributions or self.soft_teacher().logprobs != "listed":
            return self
        own, loss, fix = self.signals, self.train.loss, "name a local model in signals.model"
        if not self.captures or self.on_policy.rounds:
            what = "on_policy has rounds" if self.on_policy.rounds else "train.loss.teacher is live"
            raise ValueError(f"{what}, which needs a local teacher: {fix}")
        if own.temperatures or loss.temperature != 1:
            raise ValueError(f"an endpoint tells distributions at temperature 1 only: {fix}")
        if own.method == "sampled":
            raise ValueError(f"no endpoint gives what signals.method sampled draws from: {fix}")
        return self

    @model_validator(mode="after")
    def _came_with_answers(self) -> "Config":
        if not (self.distributions and self.signals.from_answers):
            return self
        if not self.teacher.lists_logprobs:
            raise ValueError(
                "signals.from_answers needs teacher.kind: endpoint and teacher.extra_body: "
                "{logprobs: true, top_logprobs: 20}"
            )
        return self

    @model_validator(mode="after")
    def _captured(self) -> "Config":
        if not self.distributions:
            return self
        loss, kept = self.train.loss, (1.0, *self.signals.temperatures)
        if self.soft_teacher().logprobs is None:
            asking = "train.loss has soft parts" if loss.soft else "on_policy has rounds"
            raise ValueError(
                f"{asking}, which a local teacher must read: name one in signals.model"
            )
        if (self.captures or self.on_policy.rounds) and loss.temperature not in kept:
            raise ValueError(
                f"train.loss.temperature {loss.temperature:g} is not captured: "
                "add it to signals.temperatures"
            )
        return self

    @property
    def buys_signals(self) -> bool:
        """Tell whether a server is asked to read the answers again, for their distributions."""
        served = self.soft_teacher().logprobs == "listed"
        return self.captures and served and not self.signals.from_answers

    def soft_teacher(self) -> Teacher:
        """Return whose distributions are captured: the teacher of `signals`, else `teacher`."""
        own = self.signals
        if own.model is None:
            return own.endpoint or self.teacher
        return LocalTeacher(model=own.model, revision=own.revision, dtype=own.dtype)

    def reader(self) -> tuple[str, str | None]:
        """Return the model, of a server that of its tokenizer, and the revision loaded here."""
        teacher, own, student = self.soft_teacher(), self.signals, self.student
        if teacher.runs_here:
            return teacher.model, teacher.revision
        if own.tokenizer:
            return own.tokenizer, own.revision
        return student.model, student.revision

    def store_folder(self) -> Path:
        """Return the folder of the store that all runs share."""
        return self.store or self.runs / ".store"

    def resolved(self) -> dict[str, Any]:
        """Return the whole tree as plain JSON values."""
        return self.model_dump(mode="json")
