"""How OpenAI-compatible servers are asked, and how their answers are read; no network.

A reply is read from its stored bytes, so a better reader costs no request. Field names follow
OpenAI, vLLM, SGLang, OpenRouter and `transformers serve`; tests/fixtures/wire holds a reply of
each, with its source. Nothing here raises on a hostile body: what cannot be read becomes a reply of
stop "error".
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

from pydantic import JsonValue

from distill.config.teachers import EndpointTeacher
from distill.reasoning import split_reasoning
from distill.records import Candidate, Record, Stop, TokenLogprob, Usage

if TYPE_CHECKING:
    from distill.responders.responder import Request

# Why an answer stopped: the makers' words in small letters without what is between them. OpenAI,
# vLLM, SGLang, llama.cpp, Ollama, LM Studio, TGI, Google, Anthropic, Mistral, DeepSeek, Together,
# Cohere, Bedrock, watsonx, Zhipu, AI21
STOP_WORDS: dict[Stop, str] = {
    "end": "stop eos eostoken eosfound endoftext endofturn endturn end stopsequence stopstring"
    " stopstringfound stoptoken word complete completed done finished",
    "length": "length maxtokens maxoutputtokens maxnewtokens maxlength maxtokensreached"
    " maxpredictedtokensreached tokenlimit limit timelimit modellength contextlength"
    " contextlengthreached contextlengthexceeded modelcontextwindowexceeded truncated"
    " incomplete notfinished errorlimit",
    "filtered": "contentfilter contentfiltered filtered refusal safety recitation blocklist"
    " prohibitedcontent spii language imagesafety sensitive outputsensitive moderation"
    " guardrailintervened errortoxic modelarmor",
    "error": "error failed abort aborted cancelled canceled usercancel userstopped timeout"
    " insufficientsystemresource networkerror modelerror modelunloaded load unload pauseturn"
    " malformedresponse toolcalls toolcall functioncall tooluse malformedfunctioncall"
    " unexpectedtoolcall",
}
STOPS = {word: stop for stop, words in STOP_WORDS.items() for word in words.split()}
TOOLS = ("toolcalls", "toolcall", "functioncall", "tooluse")
CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')  # there is one at least
KEPT_ALIVE = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s++|:[^\n]*+(?:\n|\Z))*+")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # where a lone surrogate may stand
LARGE = 64 << 10  # bytes; no answer's text is, but distributions are
UNKNOWN_FINISH = "unknown finish_reason"
MESSAGE_CHARS = 200  # of a server's message in ours


LOOSE = {"allOf", "not", "dependentRequired", "dependentSchemas", "if", "then", "else"}
PATHS = {"chat": "/chat/completions", "completions": "/completions"}


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
    """Return a body as a record holds it: text where it is UTF-8, deflated where it is large.

    Its sha256 stands beside it.
    """
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


def path(settings: EndpointTeacher) -> str:
    """Return what is posted to, behind an address.

    Azure's has a version, and a deployment, which is `model` where the address names none.
    """
    if not settings.azure:
        return PATHS[settings.api]
    deployment = f"/openai/deployments/{quote(settings.model, safe='')}"
    above = {"": deployment, "/openai": deployment.removeprefix("/openai")}
    version = f"?api-version={settings.api_version}" if settings.api_version else ""
    path = urlsplit(settings.base_urls[0]).path
    return f"{above.get(path, '')}{PATHS[settings.api]}{version}"


def headers(settings: EndpointTeacher, key: str | None) -> dict[str, str]:
    """Return the header that carries the key."""
    if not key:
        return {}
    return {"api-key": key} if settings.azure else {"authorization": f"Bearer {key}"}


def body(request: "Request", settings: EndpointTeacher) -> dict[str, Any]:
    """Return the fields of a request that were set, and no other.

    A neutral top_p is not sent. Without a chat interface the contents are joined by blank lines: no
    template is applied.
    """
    if ids := getattr(request, "ids", None):  # a text to score
        content = {"prompt": ids}
    elif settings.api == "chat":
        content: dict[str, Any] = {"messages": [m.model_dump() for m in request.messages]}
        if settings.chat_template_kwargs:
            content["chat_template_kwargs"] = settings.chat_template_kwargs
    else:
        content = {"prompt": "\n\n".join(message.content for message in request.messages)}
    sampling = request.sampling
    fields: dict[str, Any] = {} if sampling.top_p == 1 else {"top_p": sampling.top_p}
    if "temperature" not in settings.omit:
        fields["temperature"] = sampling.temperature
    if "max_tokens" not in settings.omit:
        fields[settings.max_tokens_field] = sampling.max_new_tokens
    if schema := request.output_schema:
        named = {"name": "answer", "schema": schema, "strict": takes_strictly(schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return {"model": settings.model, **content, **fields}


def takes_strictly(schema: Any) -> bool:
    """Tell whether OpenAI takes a schema as strict: each object closed, and all of it required."""
    parts = schema.values() if isinstance(schema, dict) else schema
    if not isinstance(schema, dict | list):
        return True
    if isinstance(schema, dict) and schema.get("type") == "object":
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        if schema.get("additionalProperties") is not False or required != properties.keys():
            return False
    return not (isinstance(schema, dict) and LOOSE & schema.keys()) and all(
        map(takes_strictly, parts)
    )


def is_answer(data: bytes) -> bool:
    """Tell an answer from an error: HTML, nothing, and an object without choices are none.

    A body with choices, which may be long, is not parsed. One that cannot be parsed may be an
    answer that broke.
    """
    data = body_of(data)
    if not data or data.startswith(b"<"):
        return False
    if b'"choices"' in data:
        return CHOICE.search(data) is not None or b'"error"' not in data
    try:
        return not isinstance(load_json(data), dict)
    except ValueError:
        return True


def body_of(data: bytes) -> bytes:
    """Return a body without what a server sends to keep the connection while it works.

    White space (DeepSeek), and lines of comment as in an event stream (OpenRouter), before the JSON
    or after it.
    """
    alive = KEPT_ALIVE.match(data)
    start, end = alive.end() if alive else 0, len(data)
    while (line := data.rfind(b"\n", start, end)) >= 0:
        last = data[line:end].strip()
        if last and not last.startswith(b":"):
            break
        end = line
    return data[start:end].rstrip()


def load_json(data: bytes) -> JsonValue:
    """Parse JSON strictly: UTF-8, no NaN, no endless numbers; raises ValueError in words.

    Half a surrogate pair, which JSON can name and UTF-8 cannot hold, becomes U+FFFD.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    def mended(value: JsonValue) -> JsonValue:
        if isinstance(value, str):
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if isinstance(value, list):
            return [mended(child) for child in value]
        if isinstance(value, dict):
            return {str(mended(name)): mended(child) for name, child in value.items()}
        return value

    try:
        value = json.loads(body_of(data).decode("utf-8"), parse_constant=refuse)
        return mended(value) if HALF.search(data) else value
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON breaks at byte {error.pos}") from None


def read_reply(data: bytes, question: int = 0) -> Reply:
    """Read an answer from its bytes.

    `question` is the request's length in bytes, for an estimate of missing usage.
    """
    reasoning: str | None = None
    try:
        body = load_json(data)
        choices = body.get("choices") if isinstance(body, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(body, dict) or not isinstance(choice, dict):
            raise ValueError("no choices" if isinstance(body, dict) else "not an object")
        # a text completion has the text itself in the choice
        message = choice.get("message", {"content": choice.get("text")})
        if not isinstance(message, dict):
            raise ValueError("the message is no object")
        content, thoughts = message.get("content"), list[str]()
        if isinstance(content, list):  # parts, as Mistral and others give them
            parts = [part for part in content if isinstance(part, dict)]
            thoughts = [_text(part.get("thinking")) for part in parts]
            content = "".join(_text(part.get("text")) for part in parts)
        for name in ("thinking", "reasoning_content", "reasoning"):  # of which the last counts
            field = message.get(name)
            reasoning = field if isinstance(field, str) and field.strip() else reasoning
        reasoning = reasoning or "".join(thoughts) or None
        finish = _finish(choice)
        explained = message.get("tool_calls") or message.get("refusal") or choice.get("error")
        stopped_short = STOPS.get(_plain(finish)) in ("length", "filtered", "error")
        if content is None and (explained or reasoning or stopped_short):
            content = ""
        if not isinstance(content, str):
            raise ValueError("the content is no text")
        text, block = split_reasoning(content) if reasoning is None else (content, None)
    except ValueError as error:
        return Reply(stop="error", error=f"unreadable answer: {error}"[:MESSAGE_CHARS])
    model, usage = body.get("model"), body.get("usage")
    fields = usage if isinstance(usage, dict) else {}
    reasoning = reasoning or block
    usage = _usage(fields, question, len((reasoning or "") + text))
    stop, why = _stop(message, choice.get("error"), finish)
    if stop is None:  # it does not say, or in a word that nobody knows
        stop = "end" if text.strip() else "error"
    return Reply(
        text=text,
        reasoning=reasoning,
        stop=stop,
        usage=usage,
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
    word = word.partition(":")[0].rpartition(".")[2].lower()
    return "".join(c for c in word if c.isalpha()).removeprefix("finishreason")


def _finish(choice: dict[str, JsonValue]) -> str:
    """Return why a choice says that it stopped, in the first word that is known; "" for none."""
    words = list[str]()
    for name in ("finish_reason", "native_finish_reason", "stop_reason", "done_reason"):
        word = choice.get(name)
        if isinstance(word, dict):  # SGLang's own form
            word = word.get("type")
        words += [word] if isinstance(word, str) and word.strip() else []
    return next((word for word in words if _plain(word) in STOPS), words[0] if words else "")


def _stop(
    message: dict[str, JsonValue], error: JsonValue, finish: str
) -> tuple[Stop | None, str | None]:
    """Return why an answer stopped, None where nobody knows, and what to say of it."""
    refusal, word = message.get("refusal"), _plain(finish)
    if error or word == "error":
        reason = plain_message(error) or "no reason given"
        return "error", f"the server broke off: {reason}"
    if isinstance(refusal, str) and refusal:
        return "filtered", f"refusal: {plain_message(refusal)}"
    if message.get("tool_calls") or word in TOOLS:
        return "error", "tool_calls: it called a tool instead of answering"
    stop = STOPS.get(word)
    if stop in ("filtered", "error"):
        return stop, finish[:MESSAGE_CHARS]
    return stop, f"{UNKNOWN_FINISH} {finish[:40]!r}" if stop is None else None


def _logprobs(field: Any) -> tuple[TokenLogprob, ...] | None:
    """Return each token's log-probability and the top-k beside it; None where they cannot be read.

    Chat completions hold an object a token, text completions lists side by side; vLLM and SGLang
    write -9999 for minus infinity. From their sources, as in the fixtures.
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
    read = token_count(fields.get("prompt_tokens", fields.get("input_tokens")))
    output = token_count(fields.get("completion_tokens", fields.get("output_tokens")))
    if not read or output is None or (answer and not output):
        return estimated_usage(question, answer)
    inside, outside = (fields.get(f"{side}_tokens_details") for side in ("prompt", "completion"))
    # OpenAI; Moonshot; DeepSeek; Anthropic's name, which proxies pass on
    cached = token_count(inside.get("cached_tokens")) if isinstance(inside, dict) else None
    for name in ("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens"):
        cached = cached or token_count(fields.get(name))
    reasoning = token_count(outside.get("reasoning_tokens")) if isinstance(outside, dict) else None
    total = token_count(fields.get("total_tokens")) or 0
    return Usage(
        input_tokens=read,
        cached_input_tokens=min(cached or 0, read),
        output_tokens=max(output, total - read),  # xAI and Google count reasoning in the total only
        reasoning_tokens=reasoning or token_count(fields.get("reasoning_tokens")) or 0,
    )


def estimated_usage(question: int, answer: int) -> Usage:
    """Return 4 characters a token, for a reply without usage."""
    return Usage(input_tokens=-(-question // 4), output_tokens=-(-answer // 4), estimated=True)


def token_count(value: object) -> int | None:
    """Return a number of tokens, or None for what is none (a text, a negative, a truth value)."""
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
    """Return a cost in dollars, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        dollars = Decimal(repr(value))
    except InvalidOperation:
        return None
    return dollars if dollars.is_finite() and dollars >= 0 else None


def plain_message(value: object) -> str:
    """Return a server's message on one line, cut, without what would steer a terminal."""
    if isinstance(value, dict) and "message" in value:
        value = value["message"]
    text = value if isinstance(value, str) else json.dumps(value) if value else ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:MESSAGE_CHARS]
