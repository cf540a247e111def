"""What a reply that is no answer means for its item and for the run: tables of the makers' words.

Nothing here quotes an HTTP exception: its text may hold headers, and with them the key.
"""

import json
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from distill.responders.endpoint.rate_limits import retry_after, stated_wait
from distill.responders.endpoint.wire import MESSAGE_CHARS, body_of, load_json, plain_message

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
    # of the request's form, which the next request shares: `transformers serve`, OpenRouter,
    # DeepSeek, Hugging Face, LiteLLM
    (
        404,
        r"Server is pinned to|Unexpected fields in the request|Model Not Exist|Invalid model name"
        r"|is not a valid model ID|requested model .{1,200} not supported",
    ),
    (402, r"quota (exceeded|exhausted)|exceeded .{0,30}quota"),  # of a 429 it may be a minute's
)
UNPAID = {429, 503, 529}  # turned away before any work was done
FIXES = {
    401: "check the key in the variable that teacher.api_key_env names",
    402: "the account's quota is used up: add credit, then run again",
    403: "check what the key may do, and teacher.model",
    404: "check teacher.base_url, teacher.model and teacher.extra_body",
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


class Failure(NamedTuple):
    """What an attempt without an answer means: for it (retry), its item, or the whole run."""

    what: str
    scope: Literal["retry", "item", "run"]
    billed: Literal["no", "unknown"] = "no"
    fix: str = "run the same command again"
    replica: bool = False  # this address failed, another may answer
    limited: bool = False  # the rate was too high: all workers wait
    hollow: bool = False  # a reply as of success, which may be charged, without an answer


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
    message, codes = error_of(body)
    billed: Literal["no", "unknown"] = "no"
    what = f"{status}: {message}" if message else f"{status} without a message"
    if 200 <= status < 300:  # success, as the server says: nobody knows then whether it charges
        billed = "unknown"
        if not message:
            text = plain_message(body_of(data)[:MESSAGE_CHARS].decode("utf-8", "replace"))
            what = f"{status}, no answer: {text or 'nothing'}"
        status = status_like(codes, status)  # what its code says
    success, form = 200 <= status < 300, status in (400, 422)
    # an object that says why there is no answer, `{"code": 1301, "msg": ...}`
    declared = isinstance(body, dict) and bool(body) and not body.get("error")
    refused = (success and declared) or (400 <= status < 500 and status not in (408, 409, 425))
    # OpenRouter's moderation is about one prompt, other 403 about the key
    moderated = status == 403 and _has("moderation|flagged", message)
    fix = None if moderated else FIXES.get(status)
    if 300 <= status < 400:
        what = f"{status}: a redirect"
        fix = "redirects are never followed: write the final address in teacher.base_url"
    # of Google's quotas a day's is named so, beside a delay of seconds
    elif status == 429 and re.search(rb'"quotaId"\s*:\s*"[^"]{0,80}PerDay', data):
        fix = FIXES[402]
    elif fix is None and (form or declared) and (field := _unsupported(message, body, request)):
        what = f"the server does not take {field} ({what})"
        fix = FIELD_FIXES.get(field, f"remove {field} from teacher.extra_body")
    elif fix is None and (refused or success):
        asked = request.decode("utf-8", "replace").lower()
        # a limit that says when it passes may speak of billing too: then the codes alone count
        passes = status == 429 and (
            retry_after(headers) is not None or stated_wait({}, data) is not None
        )
        text = " ".join([*([] if passes else [message]), *sorted(codes)])
        for like, pattern in ACCOUNT[: -1 if status == 429 else None]:
            match = re.search(pattern, text, re.IGNORECASE)
            if match and match[0].lower() not in asked:
                fix = FIXES[like]
                break
    if fix:
        return Failure(what, "run", fix=fix)
    if status == 429:
        # one that exceeds a minute's tokens alone never passes: OpenAI, Groq
        limited = not _has("request (is )?too large", message)
        return Failure(what, "retry" if limited else "item", limited=limited)
    if refused:
        return Failure(what, "item", billed)
    replica = status in (502, 503, 504)
    billed = "no" if status in UNPAID else "unknown"
    return Failure(what, "retry", billed, replica=replica, hollow=success)


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
    """Return what a failure means of a text to score, without which a run cannot go on."""
    refused = failure.scope == "item" or failure.what.startswith(("400", "422"))
    return failure._replace(scope="run", fix=SCORING_FIX) if refused else failure


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
