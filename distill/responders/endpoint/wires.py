"""The wires: a module for each way in which servers are asked and answer.

What is stored does not depend on the wire: a reply is known by its form. So one that a gateway
gives in another form than it was asked for is read too, also long after it was stored.
"""

from typing import TYPE_CHECKING, Any, Protocol

from distill.config.teachers import EndpointTeacher
from distill.records import Usage
from distill.responders.endpoint import anthropic, wire
from distill.responders.endpoint.wire import Reply, unpack

if TYPE_CHECKING:
    from distill.responders.responder import Request


class Wire(Protocol):
    """What a module says of its servers; another maker's form is another module, and a line below.

    A maker's batch takes the same `body`, and its results hold what `read_reply` reads.
    """

    def path(self, settings: EndpointTeacher) -> str:
        """Return what is posted to, behind an address."""
        ...

    def headers(self, settings: EndpointTeacher, key: str | None) -> dict[str, str]:
        """Return the headers that this server wants, with the key."""
        ...

    def body(self, request: "Request", settings: EndpointTeacher) -> dict[str, Any]:
        """Return the fields of a request."""
        ...

    def is_answer(self, data: bytes) -> bool:
        """Tell an answer from an error."""
        ...

    def read_reply(self, data: bytes, question: int = 0) -> Reply:
        """Read an answer from its bytes; what cannot be read is a reply of stop "error"."""
        ...


WIRES: dict[str, Wire] = {"openai": wire, "anthropic": anthropic}


def wire_of(settings: EndpointTeacher) -> Wire:
    """Return the wire of an endpoint."""
    return WIRES[settings.form]


def is_answer(data: bytes) -> bool:
    """Tell an answer, in whatever form, from an error."""
    return anthropic.is_answer(data) or wire.is_answer(data)


def read_reply(data: bytes, question: int = 0) -> Reply:
    """Read an answer, in whatever form."""
    form = anthropic if anthropic.is_answer(data) else wire
    return form.read_reply(data, question)


def read_stored(body: dict[str, Any]) -> Reply:
    """Read the reply in a stored body; a refusal, or a body cut at the cap, is an error."""
    if body.get("cut"):
        return Reply(stop="error", error=f"unreadable answer: {body['cut']}")
    status = int(body["status"])
    if not 200 <= status < 300:  # as they were stored before refusals were outcomes
        return Reply(stop="error", error=str(body.get("what", status)))
    reply = read_reply(unpack(body), int(body.get("question", 0)))
    if cut := cut_prompt(reply.usage, body.get("least")):
        return reply.model_copy(update={"stop": "error", "error": cut})
    counted = reply.usage.output_tokens if not reply.usage.estimated else 0
    if reply.stop == "end" and reply.error and 0 < body.get("cap", 0) <= counted:
        return reply.model_copy(update={"stop": "length"})  # it did not say why it stopped
    return reply


def cut_prompt(usage: Usage, least: int | None) -> str | None:
    """Return what to say where a server counts fewer tokens read than a prompt has at least."""
    if not least or usage.estimated or not 0 < usage.input_tokens < least:
        return None
    read = f"{usage.input_tokens:,} tokens of a prompt of at least {least:,}"
    return f"the server read {read}: it cuts prompts without a word"
