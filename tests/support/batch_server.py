"""A maker's batch interface on a loopback port: a real HTTP server that keeps its books on disk.

Forms of replies follow https://platform.openai.com/docs/api-reference/batch and
https://docs.anthropic.com/en/api/creating-message-batches. A job is executed when it is submitted,
and each request of it is then entered as paid; `looks` is how often it must be asked for before it
has ended. `fate` says of a question what becomes of it, `watch` hears of every moment of a request,
`change` has the results before they are sent, and `skew` is by how much the clock is wrong.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
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
                books.serve(self, "GET")

            def do_POST(self) -> None:
                books.serve(self, "POST")

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

    @property
    def paid(self) -> Counter[str]:
        """Return how often each question was executed and charged."""
        path = self.folder / "paid"
        rows = path.read_text().splitlines() if path.exists() else []
        return Counter(json.loads(row)["asked"] for row in rows)

    @property
    def bill(self) -> Decimal:
        """Return what was charged."""
        path = self.folder / "paid"
        rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        return sum((self.price.of(Usage(**row["usage"])) for row in rows), Decimal(0))

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs, the newest first."""
        paths = sorted((self.folder / "jobs").glob("*.json"), reverse=True)
        return [json.loads(path.read_text()) for path in paths]

    def serve(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        """Answer one request."""
        with self.lock:
            self.busy += 1
        try:
            self._serve(handler, method)
        finally:
            with self.lock:
                self.busy -= 1

    def _serve(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        path = handler.path.removeprefix("/v1")
        parts = path.partition("?")[0].strip("/").split("/")
        name = f"{method} /" + "/".join(p for p in parts if not p.startswith(("job-", "file-")))
        name = name + " list" if parts[-1] == "batches" and method == "GET" else name
        self.watch(f"{name} comes")
        with self.lock:
            self.requests[name] += 1
            self.bodies.append(body)
            self.headers.append({k.lower(): v for k, v in handler.headers.items()})
            status = self.status.get(name, 200)
            data = b'{"error": {"message": "no such thing here"}}'
            if status == 200:
                data = self.reply(method, path, parts, body)
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

    def reply(self, method: str, path: str, parts: list[str], body: bytes) -> bytes:
        """Return what comes of one request that is let in."""
        if method == "POST" and parts == ["files"]:
            name = f"file-{len(list((self.folder / 'files').iterdir())):04}"
            text = body.split(b"application/jsonl\r\n\r\n")[1].rpartition(b"\r\n--")[0]
            (self.folder / "files" / name).write_bytes(text)
            return json.dumps({"id": name, "purpose": "batch"}).encode()
        if method == "POST" and parts == ["batches"]:
            wanted = json.loads(body)
            lines = (self.folder / "files" / wanted["input_file_id"]).read_bytes().splitlines()
            return json.dumps(self.submit(wanted, [json.loads(line) for line in lines])).encode()
        if parts[:2] == ["messages", "batches"]:
            return self.messages(method, path, parts[2:], body)
        if parts[0] == "files":
            return self.change((self.folder / "files" / parts[1]).read_bytes())
        if parts == ["batches"]:
            after = path.partition("after=")[2]
            rows = self.jobs
            rows = rows[1 + [row["id"] for row in rows].index(after) :] if after else rows
            return json.dumps({"data": rows[:LIST], "has_more": len(rows) > LIST}).encode()
        return json.dumps(self.look(parts[-1])).encode()

    def submit(self, wanted: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Execute a job, unless it is refused, and return its row."""
        name = f"job-{len(self.jobs):04}"
        row = {"id": name, "object": "batch", **wanted, "status": "validating", "looks": 0}
        row["end"] = "failed" if self.refused(len(lines)) else self.end
        results, errors = list[dict[str, Any]](), list[dict[str, Any]]()
        for line in lines if row["end"] != "failed" else ():
            asked = question(line["body"])
            fate = self.fate(asked)
            base = {"id": "batch_req_1", "custom_id": line["custom_id"], "error": None}
            if fate in ("answer", "nothing"):
                self.charge(line["body"])
            if fate == "answer":
                reply = json.loads(answer(line["body"]))
                results.append(base | {"response": {"status_code": 200, "body": reply}})
            elif fate == "expired":
                what = {"code": "batch_expired", "message": "This request could not be executed."}
                errors.append(base | {"response": None, "error": what})
            elif fate.isdigit():
                reply = {"error": {"message": "no", "type": "x", "code": None}}
                errors.append(base | {"response": {"status_code": int(fate), "body": reply}})
        for kind, rows in (("output", results), ("error", errors)):
            row[f"{kind}_file"] = None
            if rows:
                file = f"file-{name}-{kind}"
                text = "".join(json.dumps(r) + "\n" for r in reversed(rows))  # in no order
                (self.folder / "files" / file).write_text(text)
                row[f"{kind}_file"] = file
        (self.folder / "jobs" / f"{name}.json").write_text(json.dumps(row))
        return {"id": name, "object": "batch", "status": "validating", **wanted}

    def messages(self, method: str, path: str, parts: list[str], body: bytes) -> bytes:
        """Return what comes of a request in Anthropic's form."""
        if method == "POST":
            name, results = f"job-{len(self.jobs):04}", list[dict[str, Any]]()
            requests = json.loads(body)["requests"]
            for line in requests:
                asked, usage = question(line["params"]), usage_of(line["params"])
                fate, result = self.fate(asked), dict[str, Any]()
                if fate == "answer":
                    self.charge(line["params"])
                    counts = usage.model_dump(include={"input_tokens", "output_tokens"})
                    block = {"type": "text", "text": text_of(asked)}
                    message = {"type": "message", "role": "assistant", "content": [block]}
                    message |= {"model": line["params"]["model"], "stop_reason": "end_turn"}
                    result = {"type": "succeeded", "message": {**message, "usage": counts}}
                elif fate == "expired":
                    result = {"type": "expired"}
                else:
                    error = {"type": fate, "message": "no"}
                    result = {"type": "errored", "error": {"type": "error", "error": error}}
                results.append({"custom_id": line["custom_id"], "result": result})
            text = "".join(json.dumps(row) + "\n" for row in reversed(results))
            (self.folder / "files" / name).write_text(text)
            row = {"id": name, "type": "message_batch", "looks": 0, "count": len(requests)}
            row["created_at"] = (datetime.now(UTC) + self.skew).isoformat()
            (self.folder / "jobs" / f"{name}.json").write_text(json.dumps(row))
            return json.dumps(self.message_row(row)).encode()
        if not parts:
            after = path.partition("after_id=")[2]
            rows = self.jobs
            rows = rows[1 + [row["id"] for row in rows].index(after) :] if after else rows
            page = {"data": [self.message_row(row) for row in rows[:LIST]]}
            return json.dumps({**page, "has_more": len(rows) > LIST}).encode()
        if parts[1:] == ["results"]:
            return self.change((self.folder / "files" / parts[0]).read_bytes())
        place = self.folder / "jobs" / f"{parts[0]}.json"
        row = json.loads(place.read_text())
        place.write_text(json.dumps(row | {"looks": row["looks"] + 1}))
        return json.dumps(self.message_row(row)).encode()

    def message_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a job as Anthropic tells of it."""
        ended = row["looks"] >= self.looks
        counts = {"processing": 0 if ended else row["count"], "succeeded": row["count"] * ended}
        status = "ended" if ended else "in_progress"
        return {**row, "processing_status": status, "request_counts": counts}

    def refused(self, count: int) -> bool:
        """Tell whether a job of so many requests is refused; `token_limit_exceeded:8` takes 8."""
        code, _, most = self.refusal.partition(":")
        return bool(code) and count > int(most or 0)

    def charge(self, body: dict[str, Any]) -> None:
        """Enter a request as executed."""
        usage = usage_of(body).model_dump(include={"input_tokens", "output_tokens"})
        with (self.folder / "paid").open("a") as file:
            file.write(json.dumps({"asked": question(body), "usage": usage}) + "\n")

    def look(self, name: str) -> dict[str, Any]:
        """Return how far a job is, which is further with each look."""
        path = self.folder / "jobs" / f"{name}.json"
        row = json.loads(path.read_text())
        row["looks"] += 1
        path.write_text(json.dumps(row))
        if row["looks"] <= self.looks:
            return row | {"status": "in_progress", "request_counts": {"total": 2, "completed": 1}}
        row |= {"output_file_id": row["output_file"], "error_file_id": row["error_file"]}
        if row["end"] == "failed":
            code = self.refusal.partition(":")[0]
            row["errors"] = {"data": [{"code": code, "message": f"{code}: no", "line": None}]}
        return row | {"status": row["end"]}
