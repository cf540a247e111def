"""Hold a server's answers against the local teacher's: the same requests, equal texts, and how near
a tie each differs.

    distill generate configs/endpoint.yaml teacher.model=qwen2.5-coder-0.5b-instruct
    python scripts/benchmarks/compare_server.py runs/endpoint --json compare.json

Reads what the store has of a run's answers from a greedy endpoint, finished or not, and answers the
same prompts with the same model here, unless the store has these answers already. A request counts
as the same where the stored length of what was sent is that of our messages, and the server counted
as many input tokens as the local tokenizer. Where texts differ, the log-probabilities of the two
tokens at which they part are compared, as a float32 copy of the model gives them; the server's
tokens are those of its text.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmark_generate import tie
from rich.table import Table

from distill.config.teachers import EndpointTeacher
from distill.config.tree import Config
from distill.models.chat_template import encode_prompt, encode_text
from distill.records import Message, Prompt, Response
from distill.responders.ask import Ask
from distill.responders.endpoint.transport import encode
from distill.responders.local.local_model import LocalResponder
from distill.responders.responder import Request, Sampling, origin_of
from distill.responders.store import ResponseStore
from distill.storage.files import read_records, write_json
from distill.storage.progress import console, say
from distill.storage.run_folder import Run, open_run

NEAR = 0.1  # nats: row 3 of the targets


def requests_of(config: Config, origin: str, prompts: list[Prompt]) -> list[Request]:
    """Return the requests of the run's prompts to one origin."""
    asked = config.teacher
    drawn = Sampling(
        temperature=asked.temperature, top_p=asked.top_p, max_new_tokens=asked.max_new_tokens
    )
    return [Request.make(origin, p.id, p.asked_of_teacher(), drawn) for p in prompts]


def local_answers(
    responder: LocalResponder, requests: list[Request], store: Path
) -> dict[str, tuple[Response, list[int]]]:
    """Answer here what the store lacks; return each response with its token ids, by prompt."""
    with Ask(responder, store) as ask:
        found = ask.responses(requests, "local")
        bodies = {r.prompt_id: ask.store.get("response", r.id) for r in found}
    return {r.prompt_id: (r, (bodies[r.prompt_id] or {})["body"]["ids"]) for r in found}


def served_answers(config: Config, prompts: list[Prompt]) -> tuple[dict[str, Response], int]:
    """Return the server's stored answers by prompt, and how many of them were asked with exactly so
    many bytes as ours."""
    found, same = {}, 0
    assert isinstance(config.teacher, EndpointTeacher)
    with ResponseStore(config.store_folder() / "responses", writable=False) as log:
        for request in requests_of(config, origin_of(config.teacher), prompts):
            body = log.get("response", Response.make_id(request.key, request.sample))
            if body is not None:
                found[request.prompt_id] = log.response(request)
                same += body["body"]["question"] == len(encode(request, config.teacher))
    return found, same


def parting(ours: list[int], theirs: list[int]) -> int | None:
    """Return the first place at which ids differ, or None where one is the beginning of the
    other."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)


def difference(
    exact: LocalResponder, messages: tuple[Message, ...], ours: list[int], theirs: Response
) -> dict[str, Any]:
    """Say where two answers part and how far apart, in nats, the two tokens are there."""
    ids = encode_text(exact.tokenizer, theirs.text)
    if theirs.stop == "end":
        end: Any = exact.tokenizer.eos_token_id
        ids.append(end)
    place = parting(ours, ids)
    if place is None:
        return {"place": min(len(ours), len(ids)), "nats": None}
    prompt = encode_prompt(exact.tokenizer, messages, exact.date)
    return {"place": place, "nats": tie(exact.network, prompt, ours, ids, place)}


def compare(run: Run, given: argparse.Namespace) -> dict[str, Any]:
    """Answer here what the run asked of the server, and compare."""
    config, folder = run.config, run.folder
    model, date = given.model or config.teacher.model, config.template_date
    theirs, same = served_answers(
        config, read_records(folder / "prompts.jsonl", Prompt)[:: given.every]
    )
    prompts = [p for p in read_records(folder / "prompts.jsonl", Prompt) if p.id in theirs]
    responder = LocalResponder.load(
        model, given.dtype, date=date, max_batch_size=given.max_batch_size
    )
    requests = requests_of(config, responder.origin, prompts)
    ours = local_answers(responder, requests, config.store_folder() / "responses")
    pairs = {p: (ours[p.id][0], theirs[p.id]) for p in prompts}
    equal = [p for p, (a, b) in pairs.items() if a.text == b.text]
    stripped = [p for p, (a, b) in pairs.items() if a.text != b.text and _bare(a) == _bare(b)]
    apart = [p for p in prompts if p not in equal and p not in stripped]
    exact = LocalResponder.load(model, "float32", date=date) if apart else None
    return {
        "answers": len(prompts),
        "same_requests": same,
        "same_input_tokens": sum(
            a.usage.input_tokens == b.usage.input_tokens for a, b in pairs.values()
        ),
        "equal": len(equal),
        "equal_but_for_whitespace_at_the_ends": len(stripped),
        "same_stop": sum(a.stop == b.stop for a, b in pairs.values()),
        "different": {
            p.id: difference(exact, p.asked_of_teacher(), ours[p.id][1], theirs[p.id])
            for p in apart
            if exact
        },
        "settings": {
            "dtype": given.dtype,
            "max_batch_size": given.max_batch_size,
            "torch": torch.__version__,
        },
    }


def _bare(response: Response) -> str:
    return response.text.strip()


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("", "of", str(found["answers"]))
    for name, value in found.items():
        if isinstance(value, int) and name != "answers":
            table.add_row(name.replace("_", " "), "", str(value))
    console.print(table)
    gaps = [row["nats"] for row in found["different"].values()]
    known = sorted(gap for gap in gaps if gap is not None)
    nats = [round(gap, 3) for gap in known]
    say(f"{len(gaps)} differ; nats between the two tokens where they part: {nats}")
    near = sum(gap <= NEAR for gap in known)
    say(f"within {NEAR}: {near}; one the beginning of the other: {gaps.count(None)}")


def main() -> None:
    """Compare, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", help="the local model; without it, the run's teacher.model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument(
        "--max-batch-size", type=int, help="1 answers one at a time, as a plain server does"
    )
    parser.add_argument("--every", type=int, default=1, help="compare every n-th prompt only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = compare(open_run(given.run), given)
    show(found)
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
