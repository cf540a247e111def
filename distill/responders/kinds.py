"""The kinds of responder, one line each: a module with `make`, and what pins its answers."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from distill.callables import source_hash
from distill.config.teachers import Engines, LocalTeacher, Teacher
from distill.config.tree import Config
from distill.models import registry
from distill.records import Document
from distill.responders.canned import answers_hash
from distill.responders.engines import engine_facts
from distill.responders.responder import Circumstances, Responder, origin_of


def weights(teacher: LocalTeacher, engines: Engines) -> dict[str, str]:
    """Return the hashes of a model's weights and of the files beside them, and its engine."""
    pinned = registry.identity(teacher.model, teacher.revision)
    facts = {"teacher": pinned, **registry.folder_facts("teacher", teacher.model)}
    return facts | engine_facts(teacher.engine, engines)


# The module that makes a kind's responder, and the hashes that say what its answers depend on
KINDS: dict[str, tuple[str, Callable[[Any, Engines], dict[str, str]]]] = {
    "local": ("local.local_model", weights),
    "endpoint": ("endpoint.endpoint", lambda t, _: {"endpoint": origin_of(t)}),
    "canned": ("canned", lambda t, _: {"answers": answers_hash(t.answers)}),
    "recorded": ("canned", lambda t, _: {}),
    "python": (
        "canned",
        lambda t, _: {f"responder {t.responder}": source_hash("responder", t.responder)},
    ),
}


def make_responder(
    settings: Teacher, config: Config, sources: Mapping[str, Document] | None = None
) -> Responder:
    """Make a teacher or a judge of a run; `sources` are its prompts' documents, by prompt id."""
    prices, date = config.evaluation.prices, config.template_date
    circumstances = Circumstances(config.name, date, prices, sources or {}, config.engines)
    module = import_module(f"distill.responders.{KINDS[settings.kind][0]}")
    return module.make(settings, circumstances)


def identity(settings: Teacher, engines: Engines) -> dict[str, str]:
    """Return the hashes of what a responder's answers depend on."""
    return KINDS[settings.kind][1](settings, engines)
