"""The wire of OpenAI-compatible servers: what is sent, and how what came is read. Pure functions, no network.

A reply is read from its stored bytes, so a better reader costs no request. Field names follow OpenAI, vLLM, SGLang,
OpenRouter and `transformers serve`; tests/fixtures/wire holds a reply of each, with its source. Nothing here raises
on a hostile body: what cannot be read becomes a reply of stop "error" that says why.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from distill.records import Candidate, Message, Record, Stop, TokenLogprob, Usage, canonical

VERSION = 1  # of the form of a request: part of every request's origin
STOPS: dict[str, Stop] = {"stop": "end", "length": "length", "content_filter": "filtered"}
QUOTA = {
    "insufficient_quota",
    "billing_hard_limit_reached",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
}
# A refusal of the request's form, which the next request shares: `transformers serve`, OpenRouter, DeepSeek
FORM = re.compile(
    r"Server is pinned to|Unexpected fields in the request|Model Not Exist|\S{1,200} is not a valid model ID"
)
# A refusal that is about the account and not about what was asked, whatever its status: Anthropic, OpenAI, Google,
# OpenRouter, Zhipu, Aliyun, one-api. The number is the status that says the same
ACCOUNT = (
    (
        401,
        r"\bkey\b.{0,60}\b(expired|invalid|not valid|incorrect|revoked|disabled|not found|missing)"
        r"|\b(expired|invalid|incorrect|revoked|disabled|missing|wrong)\b.{0,20}\bapi.?key"
        r"|authentication[ _](error|failed|required)|\bunauthorized\b",
    ),
    (
        402,
        r"credit balance|usage limit|spend(ing)? limit|insufficient.{0,12}(balance|quota|credit|fund)"
        r"|insufficientbalance|quota (exceeded|exhausted)|exceeded .{0,30}quota|out of credit"
        r"|no credits|balance (is )?(too low|not enough)|arrear|\boverdue\b|payment required"
        r"|billing|余额|欠费|充值",
    ),
    (
        403,
        r"\b(account|organi[sz]ation|project|workspace|team)\b.{0,60}"
        r"\b(suspended|disabled|deactivated|banned|blocked|locked|terminated|restricted)"
        r"|unsupported_country|\b(country|region|location)\b.{0,30}\bnot (supported|available)",
    ),
)
UNPAID = {429, 503, 529}  # turned away before any work was done
GATEWAY_FIXES = {
    401: "check the key in the variable that teacher.api_key_env names",
    402: "add credit, then run again",
    403: "check what the key may do, and teacher.model",
    404: "check teacher.base_url and teacher.model",
    405: "check teacher.base_url",
    410: "check teacher.base_url and teacher.model: what was there is gone",
}
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
CHOICE = re.compile(rb'"choices"\s*:\s*\[\s*\{')  # there is one at least
KEPT_ALIVE = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s++|:[^\n]*+(?:\n|\Z))*+")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # where a lone surrogate may stand
LARGE = 64 << 10  # bytes; no answer's text is, but distributions are
SHOWN = 200  # characters of a server's message in ours


class Reply(Record):
    """One answer as read from a body; `dollars` is what the server says that it cost, also to whom it passed it on."""

    text: str = ""
    reasoning: str | None = None
    stop: Stop
    finish: str | None = None  # the server's own word for why it stopped
    usage: Usage = Usage()
    model: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    dollars: Decimal | None = None
    error: str | None = None


class Fault(Record):
    """What an attempt without an answer means: for it (retry), its item, or the whole run; and its bill."""

    what: str
    scope: Literal["retry", "item", "run"]
    billed: Literal["no", "unknown"]
    fix: str = "run the same command again"
    replica: bool = False  # this address is at fault, another may answer
    limited: bool = False  # the rate was too high: all workers wait


def request_body(
    model: str,
    messages: Sequence[Message],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    api: str = "chat",
) -> bytes:
    """Encode a request with exactly the fields that were set; `extra` wins over `settings`.

    Without a chat interface the contents are joined by blank lines: no template is applied.
    """
    if api == "chat":
        asked: dict[str, Any] = {"messages": [message.model_dump() for message in messages]}
    else:
        asked = {"prompt": "\n\n".join(message.content for message in messages)}
    return canonical({"model": model, **asked, **settings, **extra})


def pack(data: bytes) -> dict[str, str]:
    """Return a body in the form in which a record holds it: text where it is UTF-8, deflated where it is large.

    Its sha256 stands beside it.
    """
    found = {"sha256": hashlib.sha256(data).hexdigest()}
    if len(data) > LARGE:
        return {**found, "raw_deflated": base64.b64encode(zlib.compress(data, 1)).decode("ascii")}
    try:
        return {**found, "raw": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {**found, "raw_base64": base64.b64encode(data).decode("ascii")}


def unpack(body: Mapping[str, Any]) -> bytes:
    """Return the bytes that `pack` took."""
    if "raw" in body:
        return str(body["raw"]).encode("utf-8")
    if "raw_deflated" in body:
        return zlib.decompress(base64.b64decode(str(body["raw_deflated"])))
    return base64.b64decode(str(body["raw_base64"]))


def decoded(data: bytes, encoding: str, limit: int) -> bytes:
    """Undo a content encoding that was not asked for; raises ValueError above `limit` bytes or where it is foreign."""
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "deflate"):
        raise ValueError(f"content encoding {encoding[:20]!r}")
    try:
        whole = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, limit + 1)
    except zlib.error:
        raise ValueError(f"damaged {encoding}") from None
    if len(whole) > limit:
        raise ValueError(f"more than {limit:,} bytes of {encoding}")
    return whole


def is_answer(status: int, data: bytes) -> bool:
    """Tell an answer from an error: HTML, nothing, and an object without choices are none.

    A body with choices, which may be long, is not parsed. What cannot be parsed may be an answer that broke.
    """
    data = body_of(data)
    if not 200 <= status < 300 or not data or data.startswith(b"<"):
        return False
    if b'"choices"' in data:
        return CHOICE.search(data) is not None or b'"error"' not in data
    try:
        return not isinstance(load_json(data), dict)
    except ValueError:
        return True


def body_of(data: bytes) -> bytes:
    """Return a body without what a server sends to keep the connection while it works.

    White space (DeepSeek), and lines of comment as in an event stream (OpenRouter), before the JSON or after it.
    """
    alive = KEPT_ALIVE.match(data)
    start, end = alive.end() if alive else 0, len(data)
    while (line := data.rfind(b"\n", start, end)) >= 0:
        last = data[line:end].strip()
        if last and not last.startswith(b":"):
            break
        end = line
    return data[start:end].rstrip()


def load_json(data: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no NaN, no endless numbers; raises ValueError in words.

    Half a surrogate pair, which JSON can name and UTF-8 cannot hold, becomes U+FFFD.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body_of(data).decode("utf-8"), parse_constant=refuse)
        return _whole(value) if HALF.search(data) else value
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON breaks at byte {error.pos}") from None


def _whole(value: Any) -> Any:
    """Replace lone surrogates in every text of a JSON value."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(child) for child in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(child) for name, child in value.items()}
    return value


def read_reply(data: bytes, question: int = 0) -> Reply:
    """Read an answer from its bytes; `question` is the request's length in bytes, for an estimate of missing usage."""
    try:
        body = load_json(data)
        choice = _first_choice(body)
        message = _message(choice)
        text, reasoning = _text(message, choice)
    except ValueError as error:
        return Reply(stop="error", error=f"unreadable answer: {error}"[:SHOWN])
    finish = choice.get("finish_reason")
    stop, why = _stop(finish if isinstance(finish, str) else None, message, choice)
    usage, dollars = _usage(body.get("usage"), question, len((reasoning or "") + text))
    reported = body.get("model")
    return Reply(
        text=text,
        reasoning=reasoning,
        stop=stop,
        finish=finish if isinstance(finish, str) else None,
        usage=usage,
        model=_name(reported),
        logprobs=_logprobs(choice.get("logprobs")),
        dollars=dollars,
        error=why,
    )


def read_stored(body: dict[str, Any]) -> Reply:
    """Read the reply out of a stored response's body; one that was refused, or cut at the size cap, is an error."""
    if body.get("cut"):
        return Reply(stop="error", error=f"unreadable answer: {body['cut']}")
    status = int(body["status"])
    if not 200 <= status < 300:
        return Reply(stop="error", error=str(body.get("what", status)))
    return read_reply(unpack(body), int(body.get("question", 0)))


def _first_choice(body: Any) -> dict[str, Any]:
    """Return the first choice of a body; raises ValueError where there is none."""
    if not isinstance(body, dict):
        raise ValueError("not an object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("no choices")
    return choices[0]


def _message(choice: dict[str, Any]) -> dict[str, Any]:
    """Return a choice's message; a text completion has the text itself in the choice."""
    message = choice.get("message", {"content": choice.get("text")})
    if not isinstance(message, dict):
        raise ValueError("the message is no object")
    return message


def _text(message: dict[str, Any], choice: dict[str, Any]) -> tuple[str, str | None]:
    """Return the answer and the reasoning that came apart from it, or before it in a think block."""
    content = message.get("content")
    if isinstance(content, list):  # parts, as some servers give them
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    explained = message.get("tool_calls") or message.get("refusal") or choice.get("error")
    named = [message.get(key) for key in ("reasoning", "reasoning_content")]
    reasoning = next((value for value in named if isinstance(value, str) and value.strip()), None)
    if content is None and (explained or reasoning or choice.get("finish_reason") != "stop"):
        content = ""
    if not isinstance(content, str):
        raise ValueError("the content is no text")
    if reasoning is None and (block := THINKING.match(content)):
        return content[block.end() :], block[1].strip()
    return content, reasoning


def _stop(
    finish: str | None, message: dict[str, Any], choice: dict[str, Any]
) -> tuple[Stop, str | None]:
    """Return why an answer stopped, and what to say where it is not to be taken as an answer."""
    if choice.get("error") or finish == "error":
        return "error", f"the server broke off: {_words(choice.get('error')) or 'no reason given'}"
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        return "filtered", f"refusal: {_words(message['refusal'])}"
    if message.get("tool_calls") or finish in ("tool_calls", "function_call"):
        return "error", "tool_calls: it called a tool instead of answering"
    if finish in ("content_filter", "refusal"):
        return "filtered", finish
    if finish in STOPS:
        return STOPS[finish], None
    return "error", f"unknown finish_reason {str(finish)[:40]!r}"


def _name(reported: Any) -> str | None:
    """Return the model that says that it answered, without the revision that `transformers serve` adds to every name."""
    named = isinstance(reported, str) and reported[:SHOWN].removesuffix("@main")
    return named or None


def _logprobs(given: Any) -> tuple[TokenLogprob, ...] | None:
    """Return each token's log-probability and the likeliest beside it; None where there are none that can be read.

    Chat completions hold an object a token, text completions lists side by side; vLLM and SGLang write -9999 for minus
    infinity. From their sources, as in the fixtures: untested against a live one.
    """
    if not isinstance(given, dict):
        return None
    try:
        return tuple(_place(row) for row in given.get("content") or _rows(given)) or None
    except (ValueError, TypeError, AttributeError):  # pydantic's own error is a ValueError
        return None


def _rows(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lists of a text completion as an object a token; raises TypeError or ValueError where they do not fit."""
    tokens, chances = given.get("tokens") or [], given.get("token_logprobs") or []
    listed = given.get("top_logprobs") or [None] * len(tokens)
    return [
        {
            "token": token,
            "logprob": chance,
            "top_logprobs": [{"token": t, "logprob": c} for t, c in (likely or {}).items()],
        }
        for token, chance, likely in zip(tokens, chances, listed, strict=True)
    ]


def _place(row: dict[str, Any]) -> TokenLogprob:
    """Read one token; raises pydantic's ValidationError."""
    listed = [Candidate(**_candidate(other)) for other in row.get("top_logprobs") or []]
    return TokenLogprob(**_candidate(row), top=tuple(listed))


def _candidate(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("token", "logprob", "bytes")}


def _usage(given: Any, question: int, answer: int) -> tuple[Usage, Decimal | None]:
    """Return the tokens that the server counted, or an estimate of 4 characters a token, marked as one; and its cost."""
    fields = given if isinstance(given, dict) else {}
    dollars = _cost(fields)
    read, written = _count(fields.get("prompt_tokens")), _count(fields.get("completion_tokens"))
    if not read or written is None or (answer and not written):
        usage = Usage(input_tokens=-(-question // 4), output_tokens=-(-answer // 4), estimated=True)
        return usage, dollars
    inside, outside = (fields.get(f"{side}_tokens_details") for side in ("prompt", "completion"))
    cached = _count(inside.get("cached_tokens")) if isinstance(inside, dict) else None
    thought = _count(outside.get("reasoning_tokens")) if isinstance(outside, dict) else None
    total = _count(fields.get("total_tokens")) or 0
    usage = Usage(
        input_tokens=read,
        cached_input_tokens=min(cached or 0, read),
        output_tokens=max(written, total - read),  # xAI counts reasoning in the total only
        reasoning_tokens=thought or _count(fields.get("reasoning_tokens")) or 0,
    )
    return usage, dollars


def _cost(fields: dict[str, Any]) -> Decimal | None:
    """Return the dollars that a server states, with those of the provider that it passed the question on to.

    OpenRouter with one's own key of a provider ("bring your own key") states its fee, often 0, and beside it what the
    provider charges; where the key is its own, the same sum stands there again.
    """
    stated, details = _dollars(fields.get("cost")), fields.get("cost_details")
    upstream = details.get("upstream_inference_cost") if isinstance(details, dict) else None
    passed_on = _dollars(upstream)
    if stated is None or passed_on is None:
        return stated if passed_on is None else passed_on
    return stated + passed_on if fields.get("is_byok") is True else max(stated, passed_on)


def _count(value: Any) -> int | None:
    """Return a number of tokens, or None for what is none (a text, a negative, a truth value)."""
    sane = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
    return value if sane else None


def _dollars(value: Any) -> Decimal | None:
    """Return a cost in dollars, or None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        dollars = Decimal(repr(value))
    except InvalidOperation:
        return None
    return dollars if dollars.is_finite() and dollars >= 0 else None


def classify(status: int, data: bytes, asked: bytes = b"") -> Fault:
    """Say what a reply that is no answer means (faults C2, C3, C4, C9, D5, H13).

    A text that is about the account ends the run, unless the words are those of `asked`, the request, repeated.
    """
    message, codes = error_of(data)
    what = f"{status}: {message}" if message else f"{status} without a message"
    well = 200 <= status < 300  # as the server says; nobody knows then whether it charges
    if well and not message:
        shown = _words(body_of(data)[:SHOWN].decode("utf-8", "replace"))
        what = f"{status} with {'HTML' if shown else 'nothing'} in place of an answer"
        if shown and not shown.startswith("<"):
            what = f"{status}, no answer: {shown}"
    if well:  # what its code says
        status = next((int(c) for c in codes if re.fullmatch(r"[45]\d\d", c)), status)
    if QUOTA & codes or status == 402:
        what = f"the account's quota is used up ({what})"
        return Fault(what=what, scope="run", billed="no", fix=GATEWAY_FIXES[402])
    if status == 429:
        return Fault(what=what, scope="retry", billed="no", limited=True)
    if 300 <= status < 400:
        fix = "redirects are never followed: write the final address in teacher.base_url"
        return Fault(what=f"{status}: a redirect", scope="run", billed="no", fix=fix)
    if status in GATEWAY_FIXES and not (status == 403 and _moderated(message)):
        return Fault(what=what, scope="run", billed="no", fix=GATEWAY_FIXES[status])
    if status in (400, 422) and FORM.match(message):
        fix = "check teacher.model, and the fields that teacher.extra_body sends"
        return Fault(what=what, scope="run", billed="no", fix=fix)
    refused = 400 <= status < 500 and status not in (408, 409, 425)
    refused = refused or (200 <= status < 300 and _declares_failure(data))
    if refused or 200 <= status < 300:
        for like, words in ACCOUNT:
            found = re.search(words, " ".join([message, *sorted(codes)]), re.IGNORECASE)
            if found and found[0].lower() not in asked.decode("utf-8", "replace").lower():
                return Fault(what=what, scope="run", billed="no", fix=GATEWAY_FIXES[like])
    if refused:
        return Fault(what=what, scope="item", billed="unknown" if well else "no")
    billed = "no" if status in UNPAID else "unknown"
    return Fault(what=what, scope="retry", billed=billed, replica=status in (502, 503, 504))


def _declares_failure(data: bytes) -> bool:
    """Tell an object that says why there is no answer, `{"code": 1301, "msg": ...}`, from an error that may pass."""
    try:
        body = load_json(data)
    except ValueError:
        return False
    return isinstance(body, dict) and bool(body) and not body.get("error")


def _moderated(message: str) -> bool:
    """Tell a 403 that is about one prompt (OpenRouter's moderation) from one that is about the key."""
    return "moderation" in message.lower() or "flagged" in message.lower()


MESSAGES = ("message", "detail", "msg", "error_msg", "error_message", "errmsg", "error_description")
CODES = ("code", "type", "status", "error_code", "errcode", "error_type")


def error_of(data: bytes) -> tuple[str, set[str]]:
    """Return the message of an error body, and its codes and types, of any of the known shapes."""
    try:
        body = load_json(data)
    except ValueError:
        return "", set()
    if isinstance(body, list) and body:  # as Google's compatible interface wraps it
        body = body[0]
    found = (body.get("error") or body) if isinstance(body, dict) else {}
    if isinstance(found, str):
        return _words(found), set()
    if not isinstance(found, dict):
        return "", set()
    codes = {str(found[name]) for name in CODES if isinstance(found.get(name), str | int)}
    return _words(next((found[name] for name in MESSAGES if found.get(name)), None)), codes


def _words(value: Any) -> str:
    """Return a server's words on one line, cut, without what would steer a terminal."""
    if isinstance(value, dict):
        value = value.get("message", "")
    text = value if isinstance(value, str) else json.dumps(value) if value else ""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:SHOWN]
