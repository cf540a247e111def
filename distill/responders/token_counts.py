"""Counts tokens with the teacher's own tokenizer, where the cache has it: nothing is downloaded, no torch is loaded."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from distill.models import download, registry
from distill.records import Response
from distill.responders.responder import Request

Counter = Callable[[str], int]


@cache
def token_counter(model: str) -> Counter | None:
    """Return what counts the tokens of a text as `model` does, or None where its tokenizer is not in the cache."""
    path = next((path for path in _places(model) if path.is_file()), None)
    if path is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _places(model: str) -> Iterable[Path]:
    """Yield where a tokenizer of a model may lie: a folder, the converted models, the Hub's cache."""
    if registry.is_folder(model):
        yield Path(model) / "tokenizer.json"
        return
    for row in registry.table().values():
        if model in (row.name, row.hub_id) and row.gguf:
            yield download.converted_folder(row.name, row.gguf) / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(registry.hub_id(model) or model, "tokenizer.json")
    except HFValidationError:  # what a server calls a model need be no name of the Hub
        return
    if isinstance(found, str):
        yield Path(found)


def recounted(
    responses: Sequence[Response], requests: Sequence[Request], model: str
) -> list[Response]:
    """Return the responses with estimated usage counted by the tokenizer of `model`; it stays marked as estimated.

    `requests` are those of the responses, in their order. The template's own tokens are not counted. Without a tokenizer
    the estimate by bytes stays. The account of what was paid does not use it: there such an answer is in doubt.
    """
    if not any(response.usage.estimated for response in responses):
        return list(responses)
    count = token_counter(model)
    pairs = zip(responses, requests, strict=True)
    return [
        _recounted(response, request, count) if count and response.usage.estimated else response
        for response, request in pairs
    ]


def _recounted(response: Response, request: Request, count: Counter) -> Response:
    read = sum(count(message.content) for message in request.messages)
    written = count((response.reasoning or "") + response.text)
    usage = {"input_tokens": read, "output_tokens": written}
    return response.model_copy(update={"usage": response.usage.model_copy(update=usage)})
