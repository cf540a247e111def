"""How servers' answers are read: OpenAI's form, in which Anthropic's is put first; no network.

A reply is read from its stored bytes, and known by its form, so a better reader costs no request.
Field names follow the servers' own; tests/fixtures/servers holds replies of each, with their
source. Nothing here raises on a hostile body: what cannot be read is a reply of stop "error".
"""

import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn

from pydantic import JsonValue

from distill import shipped_table
from distill.reasoning import split_reasoning
from distill.records import Record, Stop, TokenLogprob, Usage

TABLE = shipped_table("server_answers.yaml")
STOPS: list[tuple[Stop, str]] = [("error", TABLE["tools"]), *TABLE["stops"].items()]
CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')  # there is one at least
MESSAGE = re.compile(rb'"type"\s*:\s*"message"')  # Anthropic's; within a text quotes are escaped
# What keeps a connection: white space (DeepSeek), comments of an event stream (OpenRouter)
KEPT_ALIVE = re.compile(rb"(?:[\s\0]++|\xef\xbb\xbf|:[^\r\n]*+|data: \[DONE\])*+")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # where a lone surrogate may stand
LARGE = 64 << 10  # bytes; no answer's text is, but distributions are
MESSAGE_CHARS = 200  # of a server's message in ours


Row = dict[str, JsonValue]


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


def is_answer(data: bytes) -> bool:
    """Tell an answer from an error: HTML, nothing, and an object without choices are none.

    An answer, which may be long, is not parsed. What cannot be parsed may be one that broke.
    """
    data = body_of(data)
    if not data or data.startswith(b"<"):
        return False
    if CHOICE.search(data) or (b'"stop_reason"' in data and MESSAGE.search(data)):
        return True
    try:
        value = load_json(data)
    except ValueError:
        return True
    value = value[0] if value and isinstance(value, list) else value
    return not isinstance(value, dict) or ("choices" in value and not value.get("error"))


def body_of(data: bytes) -> bytes:
    """Return a body without what kept its connection alive before it."""
    alive = KEPT_ALIVE.match(data)
    return data[alive.end() :] if alive else data


def load_json(data: bytes) -> JsonValue:
    """Parse JSON strictly: UTF-8, no NaN, nothing behind it; raises ValueError in words.

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
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
    """Read an answer; `question`, its request's length in bytes, estimates usage where it lacks."""
    try:
        return _read(load_json(data), question)
    except ValueError as error:
        return Reply(stop="error", error=f"unreadable answer: {error}"[:MESSAGE_CHARS])


def _read(body: JsonValue, question: int) -> Reply:
    """Read an answer; raises ValueError in words."""
    body = object_of(body)
    if body.get("type") == "message" and "choices" not in body:
        body = _as_chat(body)
    choice = next(iter(objects_of(body.get("choices"))), None)
    if choice is None:
        raise ValueError("no choices")
    # a text completion has the text itself in the choice
    message = object_of(choice.get("message", {"content": choice.get("text")}))
    text, thoughts = message.get("content"), [message.get(name) for name in TABLE["thoughts"]]
    if isinstance(text, list):  # parts, as Mistral, Anthropic and others give them
        parts = objects_of(text)
        thoughts.append("\n".join(_text(p["thinking"]) for p in parts if "thinking" in p))
        text = "".join(_text(part.get("text")) for part in parts)
    reasoning = next((it for it in thoughts if isinstance(it, str) and it.strip()), None)
    stop, why = _stop(choice, message)
    if text is None and (reasoning or stop not in ("end", None)):
        text = ""
    if not isinstance(text, str):
        raise ValueError("the content is no text")
    if reasoning is None:
        text, reasoning = split_reasoning(text)
    if stop is None:  # it does not say, or in a word that nobody knows
        stop = "end" if text.strip() else "error"
    model, fields = body.get("model"), object_of(body.get("usage"))
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


def _as_chat(message: Row) -> Row:
    """Return an Anthropic message as OpenAI's form has it: its blocks are parts of the content."""
    blocks, reason = message.get("content"), message.get("stop_reason")
    kinds = ("text", "thinking", "redacted_thinking")  # others are calls, of a server's tools too
    calls = [block for block in objects_of(blocks) if block.get("type") not in kinds]
    turn: Row = {"content": blocks, "tool_calls": [*calls]}
    if reason == "refusal":
        turn["refusal"] = object_of(message.get("stop_details")).get("explanation")
    usage = object_of(message.get("usage"))
    # what was fresh is counted beside the cache
    parts = [usage.get(f"{name}input_tokens") for name in ("", "cache_creation_", "cache_read_")]
    if isinstance(parts[0], int):
        read = sum(part for part in parts if isinstance(part, int) and part > 0)
        usage = {**usage, "prompt_tokens": read}
    return {**message, "choices": [{"message": turn, "finish_reason": reason}], "usage": usage}


def object_of(value: object) -> Row:
    """Return a JSON object, an empty one in place of anything else."""
    return value if isinstance(value, dict) else {}


def objects_of(value: object) -> list[Row]:
    """Return the objects in a JSON list, none in anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _text(value: JsonValue) -> str:
    """Return the text of a part of the content, or of a list of parts in it."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in objects_of(value))
    return value if isinstance(value, str) else ""


def _stop_of(word: str) -> Stop | None:
    """Return why an answer stopped by a maker's word, or None where nobody knows."""
    # what explains it goes
    word = word[:MESSAGE_CHARS].partition(":")[0].rpartition(".")[2].lower()
    plain = "".join(c for c in word if c.isalpha()).removeprefix("finishreason")
    return next((stop for stop, pattern in STOPS if re.search(pattern, plain)), None)


def _stop(choice: Row, message: Row) -> tuple[Stop | None, str | None]:
    """Return why an answer stopped, None where nobody knows, and what to say of it."""
    fields = [choice.get(name) for name in TABLE["finishes"]]
    fields = [field.get("type") if isinstance(field, dict) else field for field in fields]  # SGLang
    words = [word for word in fields if isinstance(word, str) and word.strip()]
    finish = next((word for word in words if _stop_of(word)), words[0] if words else "")
    if error := choice.get("error"):
        return "error", f"the server broke off: {plain_message(error)}"
    if isinstance(refusal := message.get("refusal"), str) and refusal:
        return "filtered", f"refusal: {plain_message(refusal)}"
    if message.get("tool_calls") or re.search(TABLE["tools"], finish.lower()):
        return "error", "tool_calls: it called a tool instead of answering"
    stop = _stop_of(finish)
    if stop is None:
        return None, f"unknown finish_reason {finish[:40]!r}"
    return stop, finish[:MESSAGE_CHARS] if stop in ("filtered", "error") else None


def _logprobs(field: Any) -> tuple[TokenLogprob, ...] | None:
    """Return each token's log-probability and the top-k beside it; None where it is unreadable."""

    def listed(token: object, logprob: object, top: dict[str, object] | None) -> dict[str, object]:
        others = [{"token": other, "logprob": value} for other, value in (top or {}).items()]
        return {"token": token, "logprob": logprob, "top_logprobs": others}

    try:
        rows = field.get("content")
        if not rows:  # of text completions
            tokens = field.get("tokens") or []
            tops = field.get("top_logprobs") or [None] * len(tokens)
            lists = zip(tokens, field.get("token_logprobs") or [], tops, strict=True)
            rows = [listed(*one) for one in lists]
        positions = [{**row, "top": row.get("top_logprobs") or []} for row in rows]
        read = TokenLogprob.model_validate
        return tuple(read(position, extra="ignore") for position in positions) or None
    except (ValueError, TypeError, AttributeError):  # pydantic's own error is a ValueError
        return None


def _usage(fields: Row, question: int, answer: int) -> Usage:
    """Return the tokens that the server counted, or an estimate of 4 characters a token."""

    def first(count: str) -> int:
        """Return what the first of a count's names says that is not 0, else 0."""
        for side, _, name in (name.rpartition("/") for name in TABLE["counts"][count]):
            inside = object_of(fields.get(f"{side}_tokens_details")) if side else fields
            if number := _count(inside.get(name)):
                return number
        return 0

    read, cached = first("read"), first("cached")
    output = _count(fields.get("completion_tokens", fields.get("output_tokens")))
    if not read or output is None or (answer and not output):
        return Usage(input_tokens=-(-question // 4), output_tokens=-(-answer // 4), estimated=True)
    read += cached if cached > read else 0  # some count what was fresh beside it
    output = max(output, first("total") - read)
    return Usage(
        input_tokens=read,
        cached_input_tokens=cached,
        output_tokens=output,
        reasoning_tokens=first("reasoning"),
    )


def _count(value: object) -> int | None:
    """Return a number of tokens, also one written as a text or with a point, or None."""
    number = _number(value)
    return int(number) if number is not None and number < 10**9 and number % 1 == 0 else None


def _cost(fields: Row) -> Decimal | None:
    """Return the dollars that a server states, with those of a provider behind it."""
    stated = fields.get("cost", fields.get("estimated_cost"))  # DeepInfra calls it estimated
    # Perplexity divides it
    stated = _number(stated.get("total_cost") if isinstance(stated, dict) else stated)
    passed_on = _number(object_of(fields.get("cost_details")).get("upstream_inference_cost"))
    if stated is None or passed_on is None:
        return stated if passed_on is None else passed_on
    # OpenRouter with one's own key of a provider ("bring your own key") states its fee, often 0,
    # beside what the provider charges; where the key is its own, the same sum stands there again
    return stated + passed_on if fields.get("is_byok") is True else max(stated, passed_on)


def _number(value: object) -> Decimal | None:
    """Return a number that is not below 0, also one written as a text, or None for what is none."""
    try:
        return Decimal(str(value)) if 0 <= float(str(value)) < math.inf else None
    except (ValueError, ArithmeticError):  # of a text, and of more than a number holds
        return None


def plain_message(value: object) -> str:
    """Return a server's message on one line, cut, without what would steer a terminal."""
    if isinstance(value, dict) and "message" in value:
        value = value["message"]
    text = value if isinstance(value, str) else json.dumps(value) if value else ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:MESSAGE_CHARS]
