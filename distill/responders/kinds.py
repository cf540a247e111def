"""The kinds of responder: how each is made, and what pins its answers outside the config."""

from collections.abc import Mapping

from distill.callables import source_hash
from distill.config.teachers import (
    CannedTeacher,
    EndpointTeacher,
    Engines,
    LocalTeacher,
    PythonTeacher,
    Teacher,
)
from distill.config.tree import Config
from distill.models import registry
from distill.records import Document
from distill.responders.canned import (
    CannedResponder,
    FunctionResponder,
    RecordedResponder,
    answers_hash,
)
from distill.responders.endpoint.endpoint import EndpointResponder
from distill.responders.engines import engine_facts
from distill.responders.prices import load_prices
from distill.responders.responder import Responder, origin_of


def make_responder(
    settings: Teacher, config: Config, sources: Mapping[str, Document] | None = None
) -> Responder:
    """Make a teacher or a judge of a run; `sources` are its prompts' documents, by prompt id."""
    if isinstance(settings, LocalTeacher):
        from distill.responders.local.served_model import make_local  # which loads torch

        return make_local(settings, config.engines, config.template_date)
    if isinstance(settings, EndpointTeacher):
        price = load_prices(config.evaluation.prices).teacher(settings.model)
        return EndpointResponder(settings, price, config.name)
    if isinstance(settings, CannedTeacher):
        return CannedResponder.load(settings.answers, settings.model or "canned")
    if isinstance(settings, PythonTeacher):
        return FunctionResponder(settings.responder, settings.model)
    return RecordedResponder(sources or {}, settings.model or "unknown")


def identity(settings: Teacher, engines: Engines) -> dict[str, str]:
    """Return the hashes of what a responder's answers depend on."""
    if isinstance(settings, LocalTeacher):
        pinned = registry.identity(settings.model, settings.revision)
        facts = {"teacher": pinned, **registry.folder_facts("teacher", settings.model)}
        return facts | engine_facts(settings.engine, engines)
    if isinstance(settings, EndpointTeacher):
        return {"endpoint": origin_of(settings)}
    if isinstance(settings, CannedTeacher):
        return {"answers": answers_hash(settings.answers)}
    if isinstance(settings, PythonTeacher):
        name = settings.responder
        return {f"responder {name}": source_hash("responder", name)}
    return {}
