"""How servers' answers are read: OpenAI's form, in which Anthropic's is put first; no network.

A reply is read from its stored bytes, and known by its form, so a better reader costs no request,
also where a gateway answers in another form than it was asked in. Field names follow OpenAI, vLLM,
SGLang, OpenRouter and `transformers serve`; tests/fixtures/servers holds replies of each, with
their source. Nothing here raises on a hostile body: what cannot be read becomes a reply of stop
"error".
"""

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from decimal import Decimal
from types import ModuleType
from typing import Any, NoReturn

from pydantic import JsonValue

from distill.config.teachers import EndpointTeacher
from distill.reasoning import split_reasoning
from distill.records import Candidate, Record, Stop, TokenLogprob, Usage
from distill.responders.endpoint import anthropic, openai

WIRES: dict[str, ModuleType] = {"openai": openai, "anthropic": anthropic}
TOOLS = r"tool|function"
# Why an answer stopped, by the makers' words in small letters without what is between them; the
# first that fits counts
STOPS: tuple[tuple[Stop, str], ...] = (
    ("error", TOOLS),
    (
        "filtered",
        r"filter|refus|safety|recitation|block|prohibited|spii|language|sensitive|moderat"
        r"|guardrail|toxic|armor|policy",
    ),
    (
        "error",
        r"ratelimit|quota|fail|abort|cancel|user|timeout|resource|load|pause|malformed|preempt"
        r"|interrupt|error(?!limit)",
    ),
    (
        "length",
        r"length|max.*token|limit|context|truncat|incomplete|notfinished|cutoff|repetit|loop",
    ),
    ("end", r"^(stop|eos|eot|end|word|complete|done|finish|imend|s$)"),
)
CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')  # there is one at least
MESSAGE = re.compile(rb'"type"\s*:\s*"message"')  # Anthropic's; within a text quotes are escaped
# What keeps a connection: white space (DeepSeek), comments of an event stream (OpenRouter)
KEPT_ALIVE = re.compile(rb"(?:[\s\0]++|\xef\xbb\xbf|:[^\r\n]*+|data: \[DONE\])*+")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # where a lone surrogate may stand
CACHED = (  # OpenAI; Moonshot; DeepSeek; Anthropic's name, which proxies pass on
    *("prompt/cached_tokens", "cached_tokens", "prompt_cache_hit_tokens"),
    "cache_read_input_tokens",
)
REASONING = ("completion/reasoning_tokens", "reasoning_tokens", "output/thinking_tokens")
LARGE = 64 << 10  # bytes; no answer's text is, but distributions are
MESSAGE_CHARS = 200  # of a server's message in ours


class Reply(Record):
    """One answer as read from a body; `dollars` is what the server says that it cost in all."""

    text: str = ""
    reasoning: str | None = None
    stop: Stop
    usage: Usage = Usage()
    model: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    dollars: Decimal | None = None
    error: str | None = None


def pack(data: bytes) -> dict[str, str]:
    """Return a body as a record holds it, with its hash: as text, or deflated where it is large."""
    body = {"sha256": hashlib.sha256(data).hexdigest()}
    if len(data) > LARGE:
        return {**body, "raw_deflated": base64.b64encode(zlib.compress(data, 1)).decode("ascii")}
    try:
        return {**body, "raw": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {**body, "raw_base64": base64.b64encode(data).decode("ascii")}


def unpack(body: Mapping[str, object]) -> bytes:
    """Return the bytes that `pack` took."""
    if "raw" in body:
        return str(body["raw"]).encode("utf-8")
    if "raw_deflated" in body:
        return zlib.decompress(base64.b64decode(str(body["raw_deflated"])))
    return base64.b64decode(str(body["raw_base64"]))


def wire_of(settings: EndpointTeacher) -> ModuleType:
    """Return the module that says how an endpoint is asked: `path`, `headers`, `body`."""
    return WIRES[settings.form]


def is_answer(data: bytes) -> bool:
    """Tell an answer from an error: HTML, nothing, and an object without choices are none.

    An answer, which may be long, is not parsed. What cannot be parsed may be one that broke.
    """
    data = body_of(data)
    if not data or data.startswith(b"<"):
        return False
    if b'"choices"' in data:
        return CHOICE.search(data) is not None or b'"error"' not in data
    if b'"stop_reason"' in data and MESSAGE.search(data):
        return True
    try:
        value = load_json(data)
    except ValueError:
        return True
    return not isinstance(value[0] if value and isinstance(value, list) else value, dict)


def body_of(data: bytes) -> bytes:
    """Return a body without what kept its connection alive before it."""
    alive = KEPT_ALIVE.match(data)
    return data[alive.end() :] if alive else data


def load_json(data: bytes) -> JsonValue:
    """Parse JSON strictly: UTF-8, no NaN, no endless numbers; raises ValueError in words.

    Half a surrogate pair, which JSON can name and UTF-8 cannot hold, becomes U+FFFD.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    body = body_of(data)
    if body.startswith((b"data:", b"event:")):
        raise ValueError("an event stream, which was not asked for")
    try:
        text = body.decode("utf-8")
        value, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text)
        if not KEPT_ALIVE.fullmatch(text[end:].encode()):
            raise ValueError(f"JSON breaks at byte {end}")
        if HALF.search(data):
            text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
            value = json.loads(text.decode("utf-16", "replace"))
        return value
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON breaks at byte {error.pos}") from None


def read_stored(body: dict[str, Any]) -> Reply:
    """Read the reply in a stored body; a refusal, or a body cut at the cap, is an error."""
    if body.get("cut"):
        return Reply(stop="error", error=f"unreadable answer: {body['cut']}")
    status = int(body["status"])
    if not 200 <= status < 300:  # as they were stored before refusals were outcomes
        return Reply(stop="error", error=str(body.get("what", status)))
    reply = read_reply(unpack(body), int(body.get("question", 0)))
    if cut := cut_prompt(reply.usage, body.get("least")):
        return reply.model_copy(update={"stop": "error", "error": cut})
    counted = reply.usage.output_tokens if not reply.usage.estimated else 0
    if reply.stop == "end" and reply.error and 0 < body.get("cap", 0) <= counted:
        return reply.model_copy(update={"stop": "length"})  # it did not say why it stopped
    return reply


def cut_prompt(usage: Usage, least: int | None) -> str | None:
    """Return what to say where a server counts fewer tokens read than a prompt has at least."""
    if not least or usage.estimated or not 0 < usage.input_tokens < least:
        return None
    read = f"{usage.input_tokens:,} tokens of a prompt of at least {least:,}"
    return f"the server read {read}: it cuts prompts without a word"


def read_reply(data: bytes, question: int = 0) -> Reply:
    """Read an answer from its bytes.

    `question` is the request's length in bytes, for an estimate of missing usage.
    """
    try:
        body = load_json(data)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        if body.get("type") == "message" and "choices" not in body:
            body = anthropic.as_chat(body)
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise ValueError("no choices")
        # a text completion has the text itself in the choice
        message = choice.get("message", {"content": choice.get("text")})
        if not isinstance(message, dict):
            raise ValueError("the message is no object")
        content, thoughts = message.get("content"), list[str]()
        if isinstance(content, list):  # parts, as Mistral, Anthropic and others give them
            parts = [part for part in content if isinstance(part, dict)]
            thoughts = [_text(part.get("thinking")) for part in parts if "thinking" in part]
            content = "".join(_text(part.get("text")) for part in parts)
        reasoning = "\n".join(thoughts) or None
        for name in ("thinking", "reasoning_content", "reasoning"):  # of which the last counts
            field = message.get(name)
            reasoning = field if isinstance(field, str) and field.strip() else reasoning
        finish = _finish(choice)
        explained = message.get("tool_calls") or message.get("refusal") or choice.get("error")
        stopped_short = _stop_of(finish) in ("length", "filtered", "error")
        if content is None and (explained or reasoning or stopped_short):
            content = ""
        if not isinstance(content, str):
            raise ValueError("the content is no text")
    except ValueError as error:
        return Reply(stop="error", error=f"unreadable answer: {error}"[:MESSAGE_CHARS])
    text = content
    if reasoning is None:
        text, reasoning = split_reasoning(content)
    model, usage = body.get("model"), body.get("usage")
    fields = usage if isinstance(usage, dict) else {}
    stop, why = _stop(message, choice.get("error"), finish)
    if stop is None:  # it does not say, or in a word that nobody knows
        stop = "end" if text.strip() else "error"
    return Reply(
        text=text,
        reasoning=reasoning,
        stop=stop,
        usage=_usage(fields, question, len((reasoning or "") + text)),
        # without the revision that `transformers serve` adds to every name
        model=(isinstance(model, str) and model[:MESSAGE_CHARS].removesuffix("@main")) or None,
        logprobs=_logprobs(choice.get("logprobs")),
        dollars=_cost(fields),
        error=why,
    )


def _text(value: JsonValue) -> str:
    """Return the text of a part of the content, or of a list of parts in it."""
    if isinstance(value, list):
        return "".join(_text(p.get("text")) for p in value if isinstance(p, dict))
    return value if isinstance(value, str) else ""


def _plain(word: str) -> str:
    """Return a maker's word for why an answer stopped as STOPS has it; what explains it goes."""
    word = word[:MESSAGE_CHARS].partition(":")[0].rpartition(".")[2].lower()
    return "".join(c for c in word if c.isalpha()).removeprefix("finishreason")


def _stop_of(word: str) -> Stop | None:
    """Return why an answer stopped by a maker's word, or None where nobody knows."""
    for stop, pattern in STOPS:
        if re.search(pattern, _plain(word)):
            return stop
    return None


def _finish(choice: dict[str, JsonValue]) -> str:
    """Return why a choice says that it stopped, in the first word that is known; "" for none."""
    words = list[str]()
    for name in ("finish_reason", "native_finish_reason", "stop_reason", "done_reason"):
        word = choice.get(name)
        if isinstance(word, dict):  # SGLang's own form
            word = word.get("type")
        words += [word] if isinstance(word, str) and word.strip() else []
    return next((word for word in words if _stop_of(word)), words[0] if words else "")


def _stop(
    message: dict[str, JsonValue], error: JsonValue, finish: str
) -> tuple[Stop | None, str | None]:
    """Return why an answer stopped, None where nobody knows, and what to say of it."""
    refusal, word = message.get("refusal"), _plain(finish)
    if error or word == "error":
        return "error", f"the server broke off: {plain_message(error) or 'no reason given'}"
    if isinstance(refusal, str) and refusal:
        return "filtered", f"refusal: {plain_message(refusal)}"
    if message.get("tool_calls") or re.search(TOOLS, word):
        return "error", "tool_calls: it called a tool instead of answering"
    stop = _stop_of(finish)
    if stop in ("filtered", "error"):
        return stop, finish[:MESSAGE_CHARS]
    return stop, f"unknown finish_reason {finish[:40]!r}" if stop is None else None


def _logprobs(field: Any) -> tuple[TokenLogprob, ...] | None:
    """Return each token's log-probability and the top-k beside it; None where they cannot be read.

    Chat completions hold an object a token, text completions lists side by side.
    """

    def candidate(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row.get(name) for name in ("token", "logprob", "bytes")}

    try:
        rows = field.get("content")
        if not rows:
            tokens = field.get("tokens") or []
            tops = field.get("top_logprobs") or [None] * len(tokens)
            lists = zip(tokens, field.get("token_logprobs") or [], tops, strict=True)
            rows = [
                {
                    "token": token,
                    "logprob": logprob,
                    "top_logprobs": [{"token": t, "logprob": p} for t, p in (top or {}).items()],
                }
                for token, logprob, top in lists
            ]
        places = []
        for row in rows:
            top = tuple(Candidate(**candidate(other)) for other in row.get("top_logprobs") or [])
            places.append(TokenLogprob(**candidate(row), top=top))
        return tuple(places) or None
    except (ValueError, TypeError, AttributeError):  # pydantic's own error is a ValueError
        return None


def _usage(fields: dict[str, JsonValue], question: int, answer: int) -> Usage:
    """Return the tokens that the server counted, or an estimate of 4 characters a token."""

    def first(*names: str) -> int | None:
        """Return the first of some counts, each a name or SIDE/NAME, that is not 0."""
        for side, _, name in (name.rpartition("/") for name in names):
            inside = fields.get(f"{side}_tokens_details") if side else fields
            if count := token_count(inside.get(name) if isinstance(inside, dict) else None):
                return count
        return None

    read = first("prompt_tokens", "input_tokens")
    output = token_count(fields.get("completion_tokens", fields.get("output_tokens")))
    if not read or output is None or (answer and not output):
        return Usage(input_tokens=-(-question // 4), output_tokens=-(-answer // 4), estimated=True)
    cached = first(*CACHED) or 0
    read += cached if cached > read else 0  # some count what was fresh beside it
    return Usage(
        input_tokens=read,
        cached_input_tokens=cached,
        # xAI and Google count reasoning in the total only
        output_tokens=max(output, (first("total_tokens") or 0) - read),
        reasoning_tokens=first(*REASONING) or 0,
    )


def token_count(value: object) -> int | None:
    """Return a number of tokens, also one written as a text or with a point, or None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < 10**9 else None


def _cost(fields: dict[str, JsonValue]) -> Decimal | None:
    """Return the dollars that a server states, with those of the provider that it passed it on to.

    OpenRouter with one's own key of a provider ("bring your own key") states its fee, often 0, and
    beside it what the provider charges; where the key is its own, the same sum stands there again.
    """
    details = fields.get("cost_details")
    upstream = details.get("upstream_inference_cost") if isinstance(details, dict) else None
    stated, passed_on = fields.get("cost", fields.get("estimated_cost")), _dollars(upstream)
    # Perplexity divides it; DeepInfra calls it estimated
    stated = _dollars(stated.get("total_cost") if isinstance(stated, dict) else stated)
    if stated is None or passed_on is None:
        return stated if passed_on is None else passed_on
    return stated + passed_on if fields.get("is_byok") is True else max(stated, passed_on)


def _dollars(value: object) -> Decimal | None:
    """Return a cost in dollars, also one written as a text, or None for what is none."""
    try:
        if isinstance(value, bool) or not 0 <= float(str(value)) < math.inf:
            return None
        return Decimal(str(value))
    except (ValueError, ArithmeticError):  # of a text, and of more than a number holds
        return None


def plain_message(value: object) -> str:
    """Return a server's message on one line, cut, without what would steer a terminal."""
    if isinstance(value, dict) and "message" in value:
        value = value["message"]
    text = value if isinstance(value, str) else json.dumps(value) if value else ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:MESSAGE_CHARS]
