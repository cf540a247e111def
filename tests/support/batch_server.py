"""A maker's batch interface on a loopback port: a real HTTP server that keeps its books on disk.

Forms of replies follow https://platform.openai.com/docs/api-reference/batch and
https://docs.anthropic.com/en/api/creating-message-batches. A job is executed when it is submitted,
and each request of it is then entered as paid; `looks` is how often it must be asked for before it
has ended. `fate` says of a question what becomes of it, `watch` hears of every moment of a request,
`change` has the results before they are sent, and `skew` is by how much the clock is wrong.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distill.records import Usage
from distill.responders.prices import TokenPrice
from tests.support.fake_teacher import PRICE, answer, question, text_of, usage_of

HALF_PRICE = PRICE.model_copy(update={"batch_discount": Decimal("0.5")})
LIST = 3  # jobs on a page of the list


class BatchServer:
    """Serves both forms while its `with` block lasts; a second one on the same folder goes on."""

    def __init__(self, folder: Path, price: TokenPrice = HALF_PRICE) -> None:
        self.folder, self.price = folder, price.in_batch()
        self.looks, self.end = 1, "completed"
        self.fate: Callable[[str], str] = lambda asked: "answer"
        self.watch: Callable[[str], None] = lambda moment: None
        self.status: dict[str, int] = {}  # of replies, by "METHOD path"
        self.refusal = ""  # the code with which every job fails
        self.change: Callable[[bytes], bytes] = lambda results: results
        self.skew = timedelta()
        self.busy = 0  # requests that are being answered
        self.requests = Counter[str]()
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.RLock()
        (folder / "files").mkdir(parents=True, exist_ok=True)
        (folder / "jobs").mkdir(exist_ok=True)

    def __enter__(self) -> "BatchServer":
        books = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *_: object) -> None:
                return

            def do_GET(self) -> None:
                with books.lock:
                    books.busy += 1
                try:
                    books.serve(self)
                finally:
                    with books.lock:
                        books.busy -= 1

            do_POST = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # pyright: ignore  # a client was killed
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Return the base URL."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def charges(self) -> list[dict[str, Any]]:
        """Return what was executed: each question, and its usage."""
        path = self.folder / "paid"
        return list(map(json.loads, path.read_text().splitlines() if path.exists() else []))

    @property
    def paid(self) -> Counter[str]:
        """Return how often each question was executed and charged."""
        return Counter(row["asked"] for row in self.charges())

    @property
    def bill(self) -> Decimal:
        """Return what was charged."""
        return sum((self.price.of(Usage(**row["usage"])) for row in self.charges()), Decimal(0))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs, the newest first."""
        paths = sorted((self.folder / "jobs").glob("*.json"), reverse=True)
        return [json.loads(path.read_text()) for path in paths]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        method, path = handler.command, handler.path.removeprefix("/v1")
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        parts = path.partition("?")[0].strip("/").split("/")
        name = f"{method} /" + "/".join(p for p in parts if not p.startswith(("job-", "file-")))
        name = name + " list" if parts[-1] == "batches" and method == "GET" else name
        self.watch(f"{name} comes")
        with self.lock:
            self.requests[name] += 1
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            status = self.status.get(name, 200)
            reply: Any = {"error": {"message": "no such thing here"}}
            if status == 200:
                route = self.messages if parts[:2] == ["messages", "batches"] else self.openai
                reply = route(method, path, parts, body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.watch(f"{name} done")
        try:
            handler.send_response(status)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            self.watch(f"{name} half")
            handler.wfile.write(data[len(data) // 2 :])
        except OSError:  # the client has been killed
            handler.close_connection = True

    def file(self, name: str) -> Path:
        """Return where a file lies that was uploaded, or holds results."""
        return self.folder / "files" / name

    def page(self, path: str, form: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Return a page of the list of jobs, after the one that the request names."""
        after, rows = re.sub(r".*after(_id)?=|.*", "", path), self.jobs
        rows = rows[1 + [row["id"] for row in rows].index(after) :] if after else rows
        return {"data": list(map(form, rows[:LIST])), "has_more": len(rows) > LIST}

    def enter(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a job's row."""
        (self.folder / "jobs" / f"{row['id']}.json").write_text(json.dumps(row))
        return row

    def look(self, name: str) -> dict[str, Any]:
        """Return a job, which is further with each look."""
        row = json.loads((self.folder / "jobs" / f"{name}.json").read_text())
        return self.enter(row | {"looks": row["looks"] + 1})

    def execute(self, bodies: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Execute requests by their custom ids, and yield each with its fate, in no order."""
        for identity, body in reversed(bodies.items()):
            fate = self.fate(question(body))
            if fate in ("answer", "nothing"):
                usage = usage_of(body).model_dump(include={"input_tokens", "output_tokens"})
                with (self.folder / "paid").open("a") as file:
                    file.write(json.dumps({"asked": question(body), "usage": usage}) + "\n")
            yield identity, body, fate

    def openai(self, method: str, path: str, parts: list[str], body: bytes) -> object:
        """Return what comes of a request in OpenAI's form."""
        if method == "POST" and parts == ["files"]:
            name = f"file-{len(list((self.folder / 'files').iterdir())):04}"
            text = body.split(b"application/jsonl\r\n\r\n")[1].rpartition(b"\r\n--")[0]
            self.file(name).write_bytes(text)
            return {"id": name, "purpose": "batch"}
        if method == "POST" and parts == ["batches"]:
            return self.submit(json.loads(body))
        if parts[0] == "files":
            return self.change(self.file(parts[1]).read_bytes())
        if parts == ["batches"]:
            return self.page(path, dict)
        row = self.look(parts[-1])
        if row["looks"] <= self.looks:
            return row | {"status": "in_progress", "request_counts": {"total": 2, "completed": 1}}
        row |= {"output_file_id": row["output_file"], "error_file_id": row["error_file"]}
        if row["end"] == "failed":
            code = self.refusal.partition(":")[0]
            row["errors"] = {"data": [{"code": code, "message": f"{code}: no", "line": None}]}
        return row | {"status": row["end"]}

    def submit(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Execute a job, unless it is refused; `token_limit_exceeded:8` takes 8 requests."""
        lines = list(map(json.loads, self.file(wanted["input_file_id"]).read_bytes().splitlines()))
        code, _, most = self.refusal.partition(":")
        refused = bool(code) and len(lines) > int(most or 0)
        job = {"id": f"job-{len(self.jobs):04}", "object": "batch", **wanted}
        job |= {"status": "validating"}
        files = {"output": list[Any](), "error": list[Any]()}
        bodies = {} if refused else {line["custom_id"]: line["body"] for line in lines}
        for identity, body, fate in self.execute(bodies):
            row = {"id": "batch_req_1", "custom_id": identity, "error": None}
            if fate == "answer":
                reply = {"status_code": 200, "body": json.loads(answer(body))}
                files["output"].append(row | {"response": reply})
            elif fate == "expired":
                what = {"code": "batch_expired", "message": "This request could not be executed."}
                files["error"].append(row | {"response": None, "error": what})
            elif fate.isdigit():
                reply = {"error": {"message": "no", "type": "x", "code": None}}
                reply = {"status_code": int(fate), "body": reply}
                files["error"].append(row | {"response": reply})
        names = dict[str, str | None]()
        for kind, rows in files.items():
            names[f"{kind}_file"] = f"file-{job['id']}-{kind}" if rows else None
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in rows)
                self.file(f"file-{job['id']}-{kind}").write_text(text)
        self.enter({**job, **names, "looks": 0, "end": "failed" if refused else self.end})
        return job

    def messages(self, method: str, path: str, parts: list[str], body: bytes) -> object:
        """Return what comes of a request in Anthropic's form."""
        name = parts[2] if parts[2:] else ""
        if method == "GET" and not name:
            return self.page(path, self.message_row)
        if method == "GET" and parts[3:] == ["results"]:
            return self.change(self.file(name).read_bytes())
        if method == "GET":
            return self.message_row(self.look(name))
        name, results = f"job-{len(self.jobs):04}", list[dict[str, Any]]()
        bodies = {line["custom_id"]: line["params"] for line in json.loads(body)["requests"]}
        for identity, params, fate in self.execute(bodies):
            result: dict[str, Any] = {"type": "expired"}
            if fate == "answer":
                counts = usage_of(params).model_dump(include={"input_tokens", "output_tokens"})
                block = {"type": "text", "text": text_of(question(params))}
                message = {"type": "message", "role": "assistant", "content": [block]}
                message |= {"model": params["model"], "stop_reason": "end_turn", "usage": counts}
                result = {"type": "succeeded", "message": message}
            elif fate != "expired":
                error = {"type": "error", "error": {"type": fate, "message": "no"}}
                result = {"type": "errored", "error": error}
            results.append({"custom_id": identity, "result": result})
        self.file(name).write_text("".join(json.dumps(row) + "\n" for row in results))
        row = {"id": name, "type": "message_batch", "looks": 0, "count": len(bodies)}
        row["created_at"] = (datetime.now(UTC) + self.skew).isoformat()
        return self.message_row(self.enter(row))

    def message_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a job as Anthropic tells of it."""
        ended = row["looks"] >= self.looks
        counts = {"processing": 0 if ended else row["count"], "succeeded": row["count"] * ended}
        status = "ended" if ended else "in_progress"
        return {**row, "processing_status": status, "request_counts": counts}
