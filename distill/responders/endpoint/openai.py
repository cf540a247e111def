"""How OpenAI-compatible servers are asked, Azure's among them; no network.

Another way of asking is another module of these three functions, and a line in wire.WIRES.
"""

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from distill.config.teachers import EndpointTeacher

if TYPE_CHECKING:
    from distill.responders.responder import Request

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
LOOSE = {"allOf", "not", "dependentRequired", "dependentSchemas", "if", "then", "else"}


def path(settings: EndpointTeacher) -> str:
    """Return what is posted to, behind an address.

    Azure's has a version, and a deployment, which is `model` where the address names none.
    """
    if not settings.azure:
        return PATHS[settings.api]
    deployment = f"/openai/deployments/{quote(settings.model, safe='')}"
    above = {"": deployment, "/openai": deployment.removeprefix("/openai")}
    version = f"?api-version={settings.api_version}" if settings.api_version else ""
    return f"{above.get(urlsplit(settings.base_urls[0]).path, '')}{PATHS[settings.api]}{version}"


def headers(settings: EndpointTeacher, key: str | None) -> dict[str, str]:
    """Return the header that carries the key."""
    if not key:
        return {}
    return {"api-key": key} if settings.azure else {"authorization": f"Bearer {key}"}


def body(request: "Request", settings: EndpointTeacher) -> dict[str, Any]:
    """Return the fields of a request that were set, and no other.

    Without a chat interface the contents are joined by blank lines: no template is applied.
    """
    if ids := getattr(request, "ids", None):  # a text to score
        content = {"prompt": ids}
    elif settings.api == "chat":
        content: dict[str, Any] = {"messages": [m.model_dump() for m in request.messages]}
        if settings.chat_template_kwargs:
            content["chat_template_kwargs"] = settings.chat_template_kwargs
    else:
        content = {"prompt": "\n\n".join(message.content for message in request.messages)}
    fields = sampling_fields(request, settings)
    if "max_tokens" not in settings.omit:
        fields[settings.max_tokens_field] = request.sampling.max_new_tokens
    if schema := request.output_schema:
        named = {"name": "answer", "schema": schema, "strict": takes_strictly(schema)}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    return {"model": settings.model, **content, **fields}


def sampling_fields(request: "Request", settings: EndpointTeacher) -> dict[str, Any]:
    """Return what is sent of how an answer is sampled; a neutral top_p is not."""
    fields: dict[str, Any] = (
        {} if request.sampling.top_p == 1 else {"top_p": request.sampling.top_p}
    )
    if "temperature" not in settings.omit:
        fields["temperature"] = request.sampling.temperature
    return fields


def takes_strictly(schema: Any) -> bool:
    """Tell whether OpenAI takes a schema as strict: each object closed, and all of it required."""
    if isinstance(schema, list):
        return all(map(takes_strictly, schema))
    if not isinstance(schema, dict):
        return True
    properties, required = schema.get("properties", {}), set(schema.get("required", ()))
    closed = schema.get("additionalProperties") is False and required == properties.keys()
    if (schema.get("type") == "object" and not closed) or LOOSE & schema.keys():
        return False
    return all(map(takes_strictly, schema.values()))
