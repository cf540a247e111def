"""The kinds of teacher: each a class with its own keys, which says of itself what others ask."""

import re
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from distill.config.values import (
    SERVED,
    VARIABLE,
    File,
    Positive,
    Revision,
    Seconds,
    Section,
    TemplateVariables,
    checked_model,
    checked_url,
)

FROM_ENVIRONMENT = re.compile(r"\$(?:\{(?=\w+\}))?([A-Za-z_][A-Za-z0-9_]{0,99})\}?")
HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # RFC 9110, 5.6.2
OUR_HEADERS = {"host", "content-length", "content-type", "accept-encoding", "connection"}
SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|password|credential", re.IGNORECASE)
AZURE = re.compile(
    r"\.(openai|cognitiveservices|services\.ai)\.azure\.(com|us|cn)$|\.azure-api\.net$",
    re.IGNORECASE,
)


Engine = Literal["distill", "vllm", "llama.cpp"]
AnyEngine = Literal["auto", Engine]


class Questions(Section):
    """Questions that the teacher writes about each document."""

    kinds: Annotated[
        tuple[Literal["factual", "explain", "apply", "compare", "consequence"], ...],
        Field(min_length=1),
    ] = ("factual", "explain", "apply")
    """Kinds of questions: factual, explain, apply, compare, consequence."""
    per_document: Positive = 3
    """Questions asked for each document, spread over the kinds."""
    max_new_tokens: Positive = 256
    """Tokens of a reply that lists questions, at most."""
    answer_with_passage: bool = True
    """Whether the teacher sees the document when it answers its questions."""
    student_sees_passage: bool = False
    """Whether the student sees the document, in training and when it is evaluated."""


class EngineCommand(Section):
    """How an engine is started."""

    command: str | None = None
    """Command that starts it, up to the model; null takes the program on the PATH, else the
    environment that scripts/engines.sh makes."""


class Engines(Section):
    """How inference engines are started, which live in environments of their own."""

    vllm: EngineCommand = EngineCommand()
    """vLLM's server, such as `/opt/vllm/bin/vllm serve`."""
    llama_cpp: EngineCommand = EngineCommand()
    """llama.cpp's server, such as `/opt/llama.cpp/llama-server`."""


class Teacher(Section):
    """Who answers, and how: the keys of every kind, and what a kind says of itself."""

    paid: ClassVar[bool] = False  # whether an answer costs money
    runs_here: ClassVar[bool] = False  # whether its weights are loaded on this machine
    makes_answers: ClassVar[bool] = False  # else it has what answers it has, and none anew
    answers_anything: ClassVar[bool] = True  # more than the prompts that came with the corpus
    # What it tells of the next token: all probabilities, a list of the top ones, nothing
    logprobs: ClassVar[Literal["full", "listed"] | None] = None
    under_terms: ClassVar[bool] = True  # whether its answers are a model's, whose terms apply
    shaping: ClassVar[tuple[str, ...]] = ()  # its own keys that shape its answers

    kind: str
    model: str = ""
    """Model as NAME of configs/models.yaml, Hub id or ./FOLDER; of an endpoint, the server's name
    for it. Needed for `local` and `endpoint`; else the model whose terms apply to the answers."""
    revision: Revision | None = None
    """Branch, tag or commit on the Hub; null takes that of configs/models.yaml, or the newest."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the most probable tokens that hold this mass are sampled from."""
    max_new_tokens: Positive = 512
    """Tokens of an answer at most; raise it where `dropped.jsonl` lists many as truncated."""
    n: Positive = 1
    """Samples of each prompt; above 1 it needs a temperature."""
    license: str | None = None
    """License of the answers; with it recorded answers need no `terms.basis`."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Return the addresses at which it is asked; the first names it."""
        return ()

    @field_validator("model")
    @classmethod
    def _model_name(cls, value: str) -> str:
        return value and checked_model(value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not (self.runs_here or self.paid):
            return self
        if not self.model:
            raise ValueError("needs model")
        if self.n > 1 and self.temperature == 0 and "temperature" not in getattr(self, "omit", ()):
            raise ValueError("n above 1 needs a temperature above 0: greedy answers are all alike")
        return self


class LocalTeacher(Teacher):
    """A model that is loaded here."""

    runs_here = makes_answers = True
    logprobs = "full"
    shaping = ("dtype", "chat_template_kwargs", "engine")

    kind: Literal["local"] = "local"
    """`local` loads a model here, `endpoint` asks a server, `recorded` takes the answers in the
    corpus, `canned` those in a file, `python` calls a function."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; `auto`: bfloat16, where it is missing float16 (GPU), float32 (CPU)."""
    engine: AnyEngine = "auto"
    """What computes its answers: `distill`, our own, or `vllm` or `llama.cpp`, which is started for
    it; `auto` takes vllm where a GPU and vLLM are here, else `distill`, and stays so in a run."""
    concurrency: Positive | None = None
    """Requests that run at once, of an endpoint 16; null takes what fits in memory, and of another
    engine 16. Lower it where memory runs out."""
    chat_template_kwargs: TemplateVariables = {}
    """Variables of its chat template, for instance {enable_thinking: false}."""


class EndpointTeacher(Teacher):
    """A server that is asked, and paid."""

    paid = makes_answers = True
    logprobs = "listed"

    kind: Literal["endpoint"] = "endpoint"
    """`endpoint`: a server is asked."""
    base_url: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=100)]
    """Address of the API as https://HOST/v1; of replicas a list, whose first names it."""
    allow_insecure: bool = False
    """Allows http to another machine. Only for a network that you trust."""
    wire: Literal["openai", "anthropic"] | None = None
    """How the server is asked: `openai`, or `anthropic` by Anthropic's Messages API; null takes
    that where `base_url` is https://api.anthropic.com or ends in /anthropic."""
    api: Literal["chat", "completions"] = "chat"
    """`chat` posts messages to /chat/completions, `completions` plain text to /completions."""
    api_key_env: Annotated[str, Field(pattern=rf"^{VARIABLE.pattern}$")] | None = None
    """Name of the environment variable that holds the API key; the key itself stands in no file."""
    headers: dict[str, str] = {}
    """Further headers as {X-Org: $ORG}: $NAME is of the environment, and in no request's key."""
    api_version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")] | None = None
    """Azure's `api-version`, as 2024-10-21; needed unless base_url ends in /openai/v1."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The server's name for the limit of an answer; newer ones take `max_completion_tokens`."""
    omit: tuple[Literal["temperature", "max_tokens"], ...] = ()
    """Fields that the server refuses, not sent. Without max_tokens no budget can be kept."""
    extra_body: dict[str, Any] = {}
    """Further fields of each request, for instance {logprobs: true, top_logprobs: 20}."""
    chat_template_kwargs: TemplateVariables = {}
    """Variables of the server's chat template, as vLLM, SGLang and llama.cpp take them."""
    response_format: Literal["text", "json_schema"] = "text"
    """`json_schema` sends the JSON Schema of a task's checker, for servers that hold to it."""
    strict_model: bool = False
    """Stops where the server names another model than `model`, instead of warning."""
    budget_dollars: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] | None = None
    """Dollars that may be spent under the run's name; no request is sent that could exceed it.
    Needs a price in configs/prices.yaml or `evaluation.prices`."""
    batch: bool = False
    """Asks by the maker's batch interface: mostly half the price, and answers within a day. The
    command waits; stopped, it goes on where it was."""
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
    """Longest wait in seconds (Retry-After); where a server asks for more, the run stops."""
    initial_backoff: Seconds = 0.5
    """Seconds before the first retry; each further one waits longer, with jitter."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 6
    """Retries of a request that failed for a reason that may pass."""
    max_consecutive_failures: Positive = 20
    """Failures in a row, over all requests, that stop the run; what may pass counts once for all
    in flight. Before anything was answered, five requests without an answer suffice."""
    max_body_bytes: Annotated[int, Field(ge=1000, le=10**9)] = 16_000_000
    """Bytes of a reply at most; a longer one counts as failed."""

    @property
    def base_urls(self) -> tuple[str, ...]:
        """Return the addresses of the endpoint; the first names it."""
        urls = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return tuple(url.rstrip("/") for url in urls)

    @property
    def azure(self) -> bool:
        """Tell whether it is Azure OpenAI, which takes the key in a header of its own."""
        host = urlsplit(self.base_urls[0]).hostname or ""
        return self.api_version is not None or AZURE.search(host) is not None

    @property
    def form(self) -> str:
        """Return the name of the wire, as it is set or as the address says."""
        url = self.base_urls[0]  # https://api.anthropic.com/v1 is an OpenAI-compatible address
        messages = url.endswith("/anthropic") or url == "https://api.anthropic.com"
        return self.wire or ("anthropic" if messages else "openai")

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

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not HEADER.fullmatch(name) or name.lower() in {*OUR_HEADERS, "transfer-encoding"}:
                raise ValueError(f"{name[:40]!r} is no header that can be set")
            if SECRET_HEADER.search(name) and not FROM_ENVIRONMENT.search(text):
                raise ValueError(f"{name} holds a secret: write it as $NAME of the environment")
        return {name.lower(): text for name, text in value.items()}

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        for url in self.base_urls:
            checked_url(url, self.allow_insecure)
        if self.form == "anthropic" and (self.api != "chat" or "max_tokens" in self.omit):
            raise ValueError("wire anthropic has api chat, and needs max_tokens")
        path = urlsplit(self.base_urls[0]).path
        versioned = not path.endswith("/openai/v1") and self.form == "openai"
        if self.azure and versioned and not self.api_version:
            raise ValueError("Azure needs api_version, or a base_url that ends in /openai/v1")
        if self.chat_template_kwargs and (self.form, self.api) != ("openai", "chat"):
            raise ValueError("chat_template_kwargs are for wire openai and api chat")
        if self.chat_template_kwargs and "chat_template_kwargs" in self.extra_body:
            raise ValueError("chat_template_kwargs stand in extra_body too: leave them out there")
        return self


class CannedTeacher(Teacher):
    """Answers that stand in a file."""

    under_terms = False
    shaping = ("answers",)

    kind: Literal["canned"] = "canned"
    answers: File
    """File of JSON lines, {"prompt": last user turn, "answer": text}."""


class StatedCost(Teacher):
    """Answers whose cost only the user knows."""

    dollars: Decimal | None = None
    """What all answers cost, in dollars, for the report; null is unknown."""


class RecordedTeacher(StatedCost):
    """The answers that came with the corpus."""

    answers_anything = False
    shaping = ("dollars",)

    kind: Literal["recorded"] = "recorded"


class PythonTeacher(StatedCost):
    """A function of the program that calls `distill.run`."""

    makes_answers = True
    shaping = ("responder",)

    kind: Literal["python"] = "python"
    responder: str
    """Name of the function in `distill.run(..., responders={name: function})`."""


TEACHERS: tuple[type[Teacher], ...] = (
    LocalTeacher,
    EndpointTeacher,
    CannedTeacher,
    RecordedTeacher,
    PythonTeacher,
)


def _kind_of(value: object) -> str:
    """Return the kind of a teacher, read or still to be read; without one it is local."""
    kind = value.get("kind", "local") if isinstance(value, dict) else getattr(value, "kind", "")
    return kind if isinstance(kind, str) else ""


Local = Annotated[LocalTeacher, Tag("local")]
Endpoint = Annotated[EndpointTeacher, Tag("endpoint")]
Canned = Annotated[CannedTeacher, Tag("canned")]
Recorded = Annotated[RecordedTeacher, Tag("recorded")]
Python = Annotated[PythonTeacher, Tag("python")]
AnyTeacher = Annotated[Local | Endpoint | Canned | Recorded | Python, Discriminator(_kind_of)]
AnyJudge = Annotated[Local | Endpoint | Canned | Python, Discriminator(_kind_of)]
