"""Counts tokens with the teacher's own tokenizer, where the cache has it: nothing is downloaded, no torch is loaded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from distill import download, models
from distill.generation.responder import Request
from distill.records import Response

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
    if models.is_folder(model):
        yield Path(model) / "tokenizer.json"
        return
    for row in models.table().values():
        if model in (row.name, row.hub_id) and row.gguf:
            yield download.converted_folder(row.name, row.gguf) / "tokenizer.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(models.hub_id(model) or model, "tokenizer.json")
    except HFValidationError:  # what a server calls a model need be no name of the Hub
        return
    if isinstance(found, str):
        yield Path(found)


def recounted(
    responses: Sequence[Response], requests: Mapping[str, Request], count: Counter | None
) -> list[Response]:
    """Return the responses with estimated usage counted by a tokenizer; it stays marked as estimated.

    `requests` by key. The template's own tokens are not counted. Without a tokenizer the estimate by bytes stays.
    """
    return [
        _recounted(response, requests[response.request_key], count)
        if count and response.usage.estimated
        else response
        for response in responses
    ]


def _recounted(response: Response, request: Request, count: Counter) -> Response:
    read = sum(count(message.content) for message in request.messages)
    written = count((response.reasoning or "") + response.text)
    usage = {"input_tokens": read, "output_tokens": written}
    return response.model_copy(update={"usage": response.usage.model_copy(update=usage)})
