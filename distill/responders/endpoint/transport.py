"""Sends one request, and says what came: an answer, or what its failure means for item and run.

Nothing here quotes an HTTP exception: its text may hold headers, and with them the key.
"""

import asyncio
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import httpx2

from distill.config.teachers import FROM_ENVIRONMENT, EndpointTeacher
from distill.errors import DistillError, Exit
from distill.records import Record, canonical
from distill.responders.endpoint.network import Forbidden, open_network
from distill.responders.endpoint.rate_limits import retry_after, stated_wait
from distill.responders.endpoint.wire import (
    MESSAGE_CHARS,
    body_of,
    is_answer,
    load_json,
    plain_message,
    wire_of,
)
from distill.responders.responder import Request

UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
BREAKS = {
    "ConnectError": "cannot connect",
    "ConnectTimeout": "no connection in time",
    "ReadTimeout": "no bytes in time",
    "ReadError": "the connection broke",
    "RemoteProtocolError": "the connection broke off",
    "WriteTimeout": "the request could not be sent in time",
    "WriteError": "the connection broke while sending",
}
# A refusal of the request's form, which the next request shares: `transformers serve`, OpenRouter,
# DeepSeek, Hugging Face, LiteLLM
FORM = re.compile(
    r"Server is pinned to|Unexpected fields in the request|Model Not Exist|Invalid model name"
    r"|is not a valid model ID|requested model .{1,200} not supported"
)
# A refusal that is about the account and not about what was asked, whatever its status: Anthropic,
# OpenAI, Google, OpenRouter, Zhipu, Aliyun, Moonshot, Cohere, Cloudflare, Databricks, Bedrock,
# LiteLLM, one-api. The number is the status that says the same
ACCOUNT = (
    (
        401,
        r"\b(key|(security|access) token)\b.{0,60}"
        r"\b(expired|invalid|not valid|incorrect|revoked|disabled|not found|missing)"
        r"|\b(expired|invalid|incorrect|revoked|disabled|missing|wrong)\b.{0,20}\bapi.?(key|token)"
        r"|authentication[ _](error|failed|required)|\bunauthori[sz]ed\b|credentials? was not sent",
    ),
    (
        402,
        r"credit.balance|usage.limit|spend(ing)?.limit"
        r"|insufficient.{0,12}(balance|quota|credit|fund)|out of credit|no credits"
        r"|balance (is )?(too low|not enough)|arrear|\boverdue\b|payment required|billing"
        r"|budget.{0,12}exceeded|free allocation|trial key|余额|欠费|充值",
    ),
    (
        403,
        r"\b(account|organi[sz]ation|project|workspace|team)\b.{0,60}"
        r"\b(suspended|disabled|deactivated|banned|blocked|locked|terminated|restricted)"
        r"|unsupported_country|\b(country|region|location)\b.{0,30}\bnot (supported|available)",
    ),
    (402, r"quota (exceeded|exhausted)|exceeded .{0,30}quota"),  # of a 429 it may be a minute's
)
UNPAID = {429, 503, 529}  # turned away before any work was done
FIXES = {
    401: "check the key in the variable that teacher.api_key_env names",
    402: "add credit, then run again",
    403: "check what the key may do, and teacher.model",
    404: "check teacher.base_url and teacher.model",
    405: "check teacher.base_url",
    407: "check the user and password of the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY",
    410: "check teacher.base_url and teacher.model: what was there is gone",
}
SCORING_FIX = (
    "start vLLM with --max-logprobs=K and a context of train.max_length: signals need a server that"
    " gives prompt_logprobs, or signals.model"
)
MESSAGES = (
    *("message", "Message", "detail", "msg", "error_msg", "error_message", "errmsg"),
    *("error_description", "title"),
)
CODES = ("code", "type", "__type", "status", "error_code", "errcode", "error_type", "status_code")
# What a code says in words: the status that it would have been; the first that fits counts
STATUSES = (
    (429, r"rate.?limit|too.?many.?requests|resource.?exhausted|throttling"),
    (503, r"overloaded|unavailable"),
    (504, r"timeout|deadline.?exceeded"),
    (401, r"authentication|invalid.?api.?key|unauthenticated"),
    (403, r"permission"),
    (404, r"not.?found"),
    (402, r"billing"),
    (413, r"too.?large"),
    (400, r"invalid.?request"),
    (500, r"internal|^server.?error|api.?error"),
)
# A refusal of a field that every request has: OpenAI, Azure, Groq, Mistral, Google, Anthropic, vLLM
UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown (name|field|param|argument)|unexpected"
    r"|extra.{0,12}(input|field|forbidden)|not permitted|not allowed|deprecated|only the default"
    r"|cannot both|not available|supports? at most|less than or equal|is invalid for this model",
    re.IGNORECASE,
)
SCHEMA = re.compile(r"schema|response_format|output_(config|format)|structured", re.IGNORECASE)
FIELD_FIXES = {
    "max_tokens": "set teacher.max_tokens_field=max_completion_tokens, or lower max_new_tokens",
    "max_completion_tokens": "set teacher.max_tokens_field=max_tokens, or lower max_new_tokens",
    "temperature": "set 'teacher.omit=[temperature]', or another teacher.temperature",
    "top_p": "set teacher.top_p=1, which is not sent",
    **dict.fromkeys(("response_format", "output_config"), "set teacher.response_format=text"),
}
ALWAYS = {"model", "messages", "prompt"}  # in every request; what they hold differs


class Failure(Record):
    """What an attempt without an answer means: for it (retry), its item, or the whole run."""

    what: str
    scope: Literal["retry", "item", "run"]
    billed: Literal["no", "unknown"]
    fix: str = "run the same command again"
    replica: bool = False  # this address failed, another may answer
    limited: bool = False  # the rate was too high: all workers wait
    hollow: bool = False  # a reply as of success, which may be charged, without an answer


class Received(NamedTuple):
    """What came of one request: an answer, readable or not, or its failure.

    `cut` says why the body is not complete. Of a request that got no reply there is no status.
    """

    status: int | None = None
    headers: Mapping[str, str] = {}
    data: bytes = b""
    cut: str = ""
    failure: Failure | None = None


def encode(request: Request, settings: EndpointTeacher) -> bytes:
    """Return the bytes of a request, in the words of its wire; `extra_body` wins."""
    return canonical({**wire_of(settings).body(request, settings), **settings.extra_body})


def read_headers(settings: EndpointTeacher) -> dict[str, str]:
    """Return `teacher.headers` with what the environment holds; raises DistillError (exit 2)."""
    headers = dict[str, str]()
    for name, value in settings.headers.items():
        where = f"teacher.headers.{name}"
        for variable in FROM_ENVIRONMENT.findall(value):
            if not os.environ.get(variable):
                fix = f"export {variable}=..., or remove the header"
                raise DistillError(Exit.CONFIG, where, f"{variable} is not set", fix)
        headers[name] = FROM_ENVIRONMENT.sub(lambda match: os.environ[match[1]].strip(), value)
        if not (headers[name].isascii() and headers[name].isprintable()):
            what, fix = "holds what no header can", "set its variables to plain text in one line"
            raise DistillError(Exit.CONFIG, where, what, fix)
    return headers


def secrets_pattern(settings: EndpointTeacher, key: str | None) -> re.Pattern[bytes] | None:
    """Return what matches a secret as it is, and as JSON may escape it; None without a secret.

    The key, and what the environment gave for a header, unless it is short or a plain word: in the
    text of an answer it would be missing.
    """
    variables = {v for value in settings.headers.values() for v in FROM_ENVIRONMENT.findall(value)}
    values = {os.environ.get(variable, "").strip() for variable in variables}
    values = {value for value in values if len(value) >= 8 and not value.isalpha()}
    forms = [
        b"".join(rb"(?:\\?%s|\\u00(?i:%02x))" % (re.escape(c.encode()), ord(c)) for c in secret)
        for secret in sorted(values | ({key} if key else set()), key=len, reverse=True)
    ]
    return re.compile(b"|".join(forms)) if forms else None


def open_client(settings: EndpointTeacher, key: str | None, width: int) -> httpx2.AsyncClient:
    """Return a client of up to `width` connections; raises DistillError on an unusable proxy."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    headers |= wire_of(settings).headers(settings, key) | read_headers(settings)
    return open_network(
        settings,
        headers=headers,
        timeout=httpx2.Timeout(settings.read_timeout, connect=settings.connect_timeout, pool=None),
        limits=httpx2.Limits(max_connections=width, max_keepalive_connections=width),
        follow_redirects=False,
    )


async def post(
    client: httpx2.AsyncClient,
    url: str,
    body: bytes,
    settings: EndpointTeacher,
    secrets: re.Pattern[bytes] | None,
    is_answer: Callable[[bytes], bool] = is_answer,
    method: str = "POST",
    kind: str = "application/json",
) -> Received:
    """Send `body` and return what came, within the limits of time and size, without `secrets`."""
    parts, size, cut = list[bytes](), 0, ""
    most, seconds = settings.max_body_bytes, settings.total_timeout
    sending = client.stream(method, url, content=body, headers={"content-type": kind})
    try:
        async with asyncio.timeout(seconds), sending as response:
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > most:
                    cut = f"more than {most:,} bytes"
                    break
    except TimeoutError:
        what = f"no complete answer in {seconds:g} s: outcome unknown"
        return Received(failure=Failure(what=what, scope="retry", billed="unknown"))
    except httpx2.TransportError as error:
        return broken(error)
    data, encoding = b"".join(parts), response.headers.get("content-encoding", "").lower()
    if not cut and encoding not in ("", "identity"):
        try:
            data = decoded(data, encoding, most)
        except ValueError as error:
            cut = str(error)
    data, status = secrets.sub(b"[key]", data) if secrets else data, response.status_code
    answered = 200 <= status < 300 and (bool(cut) or is_answer(data))
    failure = None if answered else classify(status, data, body, response.headers)
    return Received(status, response.headers, data, cut, failure)


def broken(error: httpx2.TransportError) -> Received:
    """Return what it means that a connection was not made, or broke."""
    name = type(error).__name__
    what, billed = BREAKS.get(name, f"the connection failed ({name})"), "no"
    scope, fix = "retry", Failure.model_fields["fix"].default
    if isinstance(error, Forbidden):
        what, scope = "the name of teacher.base_url leads to a cloud's metadata service", "run"
        fix = "correct teacher.base_url, or see to who answers for this name"
    elif isinstance(error, httpx2.ProxyError):  # its text begins with the status that came
        what = f"the proxy refuses ({str(error)[:3]})" if str(error)[:3].isdigit() else what
        scope, fix = ("run" if "(407)" in what else "retry"), FIXES[407]
    elif not isinstance(error, UNSENT):
        what, billed = f"{what}: outcome unknown", "unknown"
    return Received(failure=Failure(what=what, scope=scope, billed=billed, fix=fix, replica=True))


def decoded(data: bytes, encoding: str, limit: int) -> bytes:
    """Undo a content encoding that was not asked for.

    Raises ValueError above `limit` bytes, or where the encoding is foreign or damaged.
    """
    if encoding not in ("gzip", "deflate"):
        raise ValueError(f"content encoding {encoding[:20]!r}")
    try:
        plain = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, limit + 1)
    except zlib.error:
        raise ValueError(f"damaged {encoding}") from None
    if len(plain) > limit:
        raise ValueError(f"more than {limit:,} bytes of {encoding}")
    return plain


def classify(
    status: int, data: bytes, request: bytes = b"", headers: Mapping[str, str] = {}
) -> Failure:
    """Say what a reply that is no answer means (faults C2, C3, C4, C9, D5, H13).

    A text that is about the account ends the run, unless the words are those of the request,
    repeated.
    """
    try:
        body = load_json(data)
    except ValueError:
        body = None
    # an object that says why there is no answer, `{"code": 1301, "msg": ...}`
    declared = isinstance(body, dict) and bool(body) and not body.get("error")
    message, codes = error_of(body)
    what = f"{status}: {message}" if message else f"{status} without a message"
    # success, as the server says: nobody knows then whether it charges
    well, billed, limited = 200 <= status < 300, "no", False
    if well:
        billed = "unknown"
        text = plain_message(body_of(data)[:MESSAGE_CHARS].decode("utf-8", "replace"))
        if not message:
            kind = "with HTML" if text.startswith("<") else "with nothing"
            what = f"{status} {kind} in place of an answer"
            if text and not text.startswith("<"):
                what = f"{status}, no answer: {text}"
        status = status_like(codes, status)  # what its code says
    success = 200 <= status < 300
    refused = (400 <= status < 500 and status not in (408, 409, 425)) or (success and declared)

    def ends(like: int, what: str = what, fix: str = "") -> Failure:
        """Return a failure of the whole run."""
        if like == 402:
            what = f"the account's quota is used up ({what})"
        return Failure(what=what, scope="run", billed="no", fix=fix or FIXES[like])

    # of Google's quotas a day's is named so, beside a delay of seconds
    daily = status == 429 and re.search(rb'"quotaId"\s*:\s*"[^"]{0,80}PerDay', data)
    # OpenRouter's moderation is about one prompt, other 403 about the key
    moderated = status == 403 and _has("moderation|flagged", message)
    if status == 402 or daily:
        return ends(402)
    if 300 <= status < 400:
        fix = "redirects are never followed: write the final address in teacher.base_url"
        return ends(status, f"{status}: a redirect", fix)
    if status in FIXES and not moderated:
        return ends(status)
    if status in (400, 422) and FORM.search(message):
        return ends(404, fix="check teacher.model, and the fields that teacher.extra_body sends")
    if (status in (400, 422) or declared) and (field := _unsupported(message, body, request)):
        fix = FIELD_FIXES.get(field, f"remove {field} from teacher.extra_body")
        return ends(status, f"the server does not take {field} ({what})", fix)
    if refused or success:
        asked = request.decode("utf-8", "replace").lower()
        # a limit that says when it passes may speak of billing too: then the codes alone count
        passes = retry_after(headers) is not None or stated_wait({}, data) is not None
        text = " ".join([*([] if status == 429 and passes else [message]), *sorted(codes)])
        for like, pattern in ACCOUNT[: -1 if status == 429 else None]:
            match = re.search(pattern, text, re.IGNORECASE)
            if match and match[0].lower() not in asked:
                return ends(like)
    if status == 429:
        # one that exceeds a minute's tokens alone never passes: OpenAI, Groq
        limited = not _has("request (is )?too large", message)
        return Failure(
            what=what, scope="retry" if limited else "item", billed="no", limited=limited
        )
    if refused:
        return Failure(what=what, scope="item", billed=billed)
    billed = "no" if status in UNPAID else "unknown"
    replica = status in (502, 503, 504)
    return Failure(what=what, scope="retry", billed=billed, replica=replica, hollow=success)


def status_like(codes: set[str], otherwise: int) -> int:
    """Return the status that an error's codes and types stand for."""
    coded = (int(code) for code in codes if re.fullmatch(r"[45]\d\d", code))
    words = (like for like, word in STATUSES for code in codes if _has(word, code))
    return next(coded, next(words, otherwise))


def _has(pattern: str, text: str) -> bool:
    """Tell whether a pattern stands in a text, in small letters or large ones."""
    return re.search(pattern, text, re.IGNORECASE) is not None


def _unsupported(message: str, body: object, request: bytes) -> str | None:
    """Return the field of a request that a server refuses by name, and not for what was asked."""
    try:
        asked = json.loads(request or b"{}")
    except ValueError:
        return None
    if (schema := asked.keys() & {"response_format", "output_config"}) and SCHEMA.search(message):
        return schema.pop()
    error = body.get("error") if isinstance(body, dict) else None
    param = error.get("param") if isinstance(error, dict) else None
    refusal = UNSUPPORTED.search(message)
    if refusal is None or "context" in message.lower():
        return None
    # the longest first, as `top_logprobs` holds another name
    fields = sorted(asked.keys() - ALWAYS, key=len, reverse=True)
    named = (field for field in fields if re.search(rf"(?<!\w){re.escape(field)}(?!\w)", message))
    return param if param in fields else next(named, None)


def of_scoring(failure: Failure) -> Failure:
    """Return what the failure means of a text to score.

    An answer less is an item less, but a text that is not scored ends the run.
    """
    if failure.scope != "item" and not failure.what.startswith(("400", "422")):
        return failure
    return failure.model_copy(update={"scope": "run", "fix": SCORING_FIX})


def error_of(body: object) -> tuple[str, set[str]]:
    """Return the message of an error's JSON, and its codes and types, in any known shape."""
    error = body
    for name in ("error", "errors"):  # the second Cloudflare's, in a list, as Google's is in one
        error = error[0] if isinstance(error, list) and error else error
        error = (error.get(name) or error) if isinstance(error, dict) else error
    error = error[0] if isinstance(error, list) and error else error
    if not isinstance(error, dict):
        return plain_message(error) if isinstance(error, str) and error is not body else "", set()
    codes = {str(error[name]) for name in CODES if isinstance(error.get(name), str | int)}
    message = next((error[name] for name in MESSAGES if error.get(name)), None)
    return plain_message(message), codes
