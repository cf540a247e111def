"""What a reply that is no answer means for its item and for the run, by the makers' own words."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator

from distill.config.values import Section
from distill.config.yaml_file import find_config, read_table
from distill.responders.endpoint.rate_limits import retry_after, stated_wait
from distill.responders.endpoint.wire import (
    MESSAGE_CHARS,
    body_of,
    load_json,
    object_of,
    plain_message,
)

TABLE = Path("configs/server_errors.yaml")
UNPAID = {429, 503, 529}  # turned away before any work was done
SCORING_FIX = (
    "start vLLM with --max-logprobs=K and a context of train.max_length: signals need a server that"
    " gives prompt_logprobs, or signals.model"
)
DAILY = re.compile(rb'"quotaId"\s*:\s*"[^"]{0,80}PerDay')  # Google's, beside a delay of seconds
ALWAYS = {"model", "messages", "prompt"}  # in every request; what they hold differs

WordPattern = Annotated[
    re.Pattern[str], BeforeValidator(lambda text: re.compile(text, re.IGNORECASE))
]


class Words(Section):
    """The table of servers' words, which says of each what it is."""

    messages: tuple[str, ...]
    codes: tuple[str, ...]
    statuses: tuple[tuple[int, WordPattern], ...]
    account: tuple[tuple[int, WordPattern], ...]
    unsupported: WordPattern
    schemas: WordPattern
    fixes: dict[int, str]
    field_fixes: dict[str, str]


@cache
def words() -> Words:
    """Read the table; raises DistillError (exit 2) where it is wrong."""
    return read_table(find_config(TABLE), Words, f"see the first lines of {TABLE}")


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
    """Say what a reply that is no answer means (faults C2, C3, C4, C9, D5, H13)."""
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
    success = 200 <= status < 300
    # an object that says why there is no answer, `{"code": 1301, "msg": ...}`
    declared = isinstance(body, dict) and bool(body) and not body.get("error")
    form = declared or status in (400, 422)
    refused = (success and declared) or (400 <= status < 500 and status not in (408, 409, 425))
    # OpenRouter's moderation is about one prompt, other 403 about the key
    moderated = status == 403 and re.search("moderation|flagged", message, re.IGNORECASE)
    fix = None if moderated else words().fixes.get(status)
    if 300 <= status < 400:
        what = f"{status}: a redirect"
        fix = "redirects are never followed: write the final address in teacher.base_url"
    elif status == 429 and DAILY.search(data):
        fix = words().fixes[402]
    elif not fix and form and (field := _unsupported(message, body, request)):
        what = f"the server does not take {field} ({what})"
        fix = words().field_fixes.get(field, f"remove {field} from teacher.extra_body")
    if fix is None and (refused or success):
        # a limit that says when it passes may speak of billing too: then the codes alone count
        waits = status == 429 and (retry_after(headers), stated_wait({}, data)) != (None, None)
        text = " ".join([*([] if waits else [message]), *sorted(codes)])
        question = request.decode("utf-8", "replace").lower()  # which may speak of accounts too
        for like, pattern in words().account[: -1 if status == 429 else None]:
            match = pattern.search(text)
            if not fix and match and match[0].lower() not in question:
                fix = words().fixes[like]
    if fix:
        return Failure(what, "run", fix=fix)
    if status == 429:
        # one that exceeds a minute's tokens alone never passes: OpenAI, Groq
        limited = not re.search("request (is )?too large", message, re.IGNORECASE)
        return Failure(what, "retry" if limited else "item", limited=limited)
    if refused:
        return Failure(what, "item", billed)
    replica = status in (502, 503, 504)
    billed = "no" if status in UNPAID else "unknown"
    return Failure(what, "retry", billed, replica=replica, hollow=success)


def status_like(codes: set[str], otherwise: int) -> int:
    """Return the status that an error's codes and types stand for."""
    coded = (int(code) for code in codes if re.fullmatch(r"[45]\d\d", code))
    likes = (like for like, word in words().statuses for code in codes if word.search(code))
    return next(coded, next(likes, otherwise))


def _unsupported(message: str, body: object, request: bytes) -> str | None:
    """Return the field of a request that a server refuses by name, and not for what was asked."""
    try:
        names = json.loads(request or b"{}").keys()
    except ValueError:
        return None
    schemas = names & {"response_format", "output_config"}
    if schemas and words().schemas.search(message):
        return schemas.pop()
    if not words().unsupported.search(message) or "context" in message.lower():
        return None
    param = object_of(object_of(body).get("error")).get("param")
    # the longest first, as `top_logprobs` holds another name
    fields = sorted(names - ALWAYS, key=len, reverse=True)
    stated = (field for field in fields if re.search(rf"(?<!\w){re.escape(field)}(?!\w)", message))
    return str(param) if param in fields else next(stated, None)


def of_scoring(failure: Failure) -> Failure:
    """Return what a failure means of a text to score, without which a run cannot go on."""
    refused = failure.scope == "item" or failure.what.startswith(("400", "422"))
    refused = refused or "prompt_logprobs" in failure.what
    return failure._replace(scope="run", fix=SCORING_FIX) if refused else failure


def error_of(body: object) -> tuple[str, set[str]]:
    """Return the message of an error's JSON, and its codes and types, in any known shape."""
    error = body
    # the second is Cloudflare's, in a list, as Google's is in one
    for name in ("error", "errors", ""):
        error = error[0] if isinstance(error, list) and error else error
        error = (error.get(name) or error) if isinstance(error, dict) else error
    if not isinstance(error, dict):
        return plain_message(error) if isinstance(error, str) and error is not body else "", set()
    codes = {str(error[name]) for name in words().codes if isinstance(error.get(name), str | int)}
    message = next((error[name] for name in words().messages if error.get(name)), None)
    return plain_message(message), codes
