"""What a request says: in OpenAI's form, Azure's among them, or that of Anthropic's Messages API.

Anthropic's names are those of `src/anthropic/types` in anthropics/anthropic-sdk-python. Keys and
headers come from the environment; what must stand in no file is known here, so that it is masked.
"""

import os
import re
from urllib.parse import quote, urlsplit

from pydantic import JsonValue

from distill.config.teachers import FROM_ENVIRONMENT, EndpointTeacher
from distill.errors import DistillError, Exit
from distill.records import canonical
from distill.responders.responder import Encoded, Request

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
ANTHROPIC_VERSION = "2023-06-01"  # the newest that the service names
LOOSE = {"allOf", "not", "dependentRequired", "dependentSchemas", "if", "then", "else"}


def path(settings: EndpointTeacher) -> str:
    """Return what is posted to, behind an address.

    Azure's has a version, and a deployment, which is `model` where the address names none.
    """
    if settings.form == "anthropic":
        return "/messages" if settings.base_urls[0].endswith("/v1") else "/v1/messages"
    if not settings.azure:
        return PATHS[settings.api]
    deployment = f"/openai/deployments/{quote(settings.model, safe='')}"
    above = {"": deployment, "/openai": deployment.removeprefix("/openai")}
    version = f"?api-version={settings.api_version}" if settings.api_version else ""
    return f"{above.get(urlsplit(settings.base_urls[0]).path, '')}{PATHS[settings.api]}{version}"


def encode(request: Request, settings: EndpointTeacher) -> bytes:
    """Return the bytes of a request: the fields that were set and no other; `extra_body` wins.

    Without a chat interface the contents are joined by blank lines: no template is applied.
    """
    anthropic, messages = settings.form == "anthropic", request.messages
    fields: dict[str, object] = {"model": settings.model}
    if isinstance(request, Encoded):
        fields["prompt"] = request.ids
    elif settings.api == "completions":
        fields["prompt"] = "\n\n".join(message.content for message in messages)
    elif anthropic:  # system turns stand beside the others, as one text
        fields["messages"] = [m.model_dump() for m in messages if m.role != "system"]
        if system := [m.content for m in messages if m.role == "system"]:
            fields["system"] = "\n\n".join(system)
    else:
        fields["messages"] = [m.model_dump() for m in messages]
        if settings.chat_template_kwargs:
            fields["chat_template_kwargs"] = settings.chat_template_kwargs
    if request.sampling.top_p != 1:
        fields["top_p"] = request.sampling.top_p
    if "temperature" not in settings.omit:
        fields["temperature"] = request.sampling.temperature
    if "max_tokens" not in settings.omit:
        limit = "max_tokens" if anthropic else settings.max_tokens_field
        fields[limit] = request.sampling.max_new_tokens
    if (schema := request.output_schema) and anthropic:
        fields["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    elif schema:
        answer = {"name": "answer", "schema": schema, "strict": takes_strictly(schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": answer}
    return canonical(fields | settings.extra_body)


def takes_strictly(schema: JsonValue) -> bool:
    """Tell whether OpenAI takes a schema as strict: each object closed, and all of it required."""
    if isinstance(schema, list):
        return all(map(takes_strictly, schema))
    if not isinstance(schema, dict):
        return True
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    closed = schema.get("additionalProperties") is False and set(required) == set(properties)  # pyright: ignore
    if (schema.get("type") == "object" and not closed) or LOOSE & schema.keys():
        return False
    return all(map(takes_strictly, schema.values()))


def read_key(variable: str | None) -> str | None:
    """Return the key in a variable; raises DistillError (exit 2) on an unusable one."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip(" ")
    what, fix = f"{variable} is not set", f"export {variable}=..., or remove teacher.api_key_env"
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        what, fix = f"{variable} holds a space or a newline", "set it to the key alone"
    elif key:
        return key
    raise DistillError(Exit.CONFIG, "teacher.api_key_env", what, fix)


def headers(settings: EndpointTeacher, key: str | None) -> dict[str, str]:
    """Return a request's headers: the key's, and `teacher.headers` with what the environment holds.

    Raises DistillError (exit 2) where a variable is not set, or holds what no header can.
    """
    fields = {"content-type": "application/json", "accept-encoding": "identity"}
    if settings.form == "anthropic":
        fields |= {"anthropic-version": ANTHROPIC_VERSION} | ({"x-api-key": key} if key else {})
    elif key:
        fields |= {"api-key": key} if settings.azure else {"authorization": f"Bearer {key}"}
    for name, value in settings.headers.items():
        where = f"teacher.headers.{name}"
        for variable in FROM_ENVIRONMENT.findall(value):
            if not os.environ.get(variable):
                fix = f"export {variable}=..., or remove the header"
                raise DistillError(Exit.CONFIG, where, f"{variable} is not set", fix)
        text = FROM_ENVIRONMENT.sub(lambda match: os.environ[match[1]].strip(), value)
        if not (text.isascii() and text.isprintable()):
            what, fix = "holds what no header can", "set its variables to plain text in one line"
            raise DistillError(Exit.CONFIG, where, what, fix)
        fields[name] = text
    return fields


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
