"""The forms of the makers' batch interfaces: what a job is made of, and what its results say."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from distill.records import canonical
from distill.responders.endpoint.transport import error_of, status_like
from distill.responders.endpoint.wire import load_json

ENDED = {"completed", "failed", "expired", "cancelled", "canceled", "ended"}
UNTOUCHED = {"batch_expired", "batch_cancelled", "batch_canceled"}


class Result(NamedTuple):
    """What became of one request of a job; without a status it was not executed."""

    custom_id: str
    status: int | None
    data: bytes


class Jobs:
    """OpenAI's form (https://platform.openai.com/docs/api-reference/batch).

    Azure, Groq, Together, Novita and Cerebras have it too.
    """

    path, after, uploads = "/batches", "after", True

    def __init__(self, path: str) -> None:
        self.url = f"/v1{path}"  # what each request of a job goes to

    def line(self, custom_id: str, body: bytes) -> bytes:
        """Return a request as a job holds it."""
        row = {"custom_id": custom_id, "method": "POST", "url": self.url, "body": json.loads(body)}
        return canonical(row)

    def submission(self, job: str, lines: Sequence[bytes], file: str) -> bytes:
        """Return the body that makes a job, of its lines or of the file that holds them."""
        row = {"input_file_id": file, "endpoint": self.url, "completion_window": "24h"}
        return canonical(row | {"metadata": {"distill": job}})

    def results(self, row: dict[str, Any]) -> list[str]:
        """Return the paths of an ended job's results."""
        files = (row.get(name) for name in ("output_file_id", "error_file_id"))
        return [f"/files/{quote(str(file), safe='')}/content" for file in files if file]

    def read(self, row: dict[str, Any]) -> Result:
        """Read a line of the results."""
        name, response, error = str(row.get("custom_id")), row.get("response"), row.get("error")
        if isinstance(response, dict):
            status, body = response.get("status_code"), response.get("body")
            data = body.encode() if isinstance(body, str) else canonical(body)
            return Result(name, status if isinstance(status, int) else 500, data)
        data = {"error": error}
        return Result(name, None if UNTOUCHED & error_of(data)[1] else 500, canonical(data))


class MessageJobs(Jobs):
    """Anthropic's form (https://docs.anthropic.com/en/api/creating-message-batches)."""

    after, uploads = "after_id", False

    def __init__(self, path: str) -> None:
        self.path = f"{path}/batches"

    def line(self, custom_id: str, body: bytes) -> bytes:
        """Return a request as a job holds it."""
        return canonical({"custom_id": custom_id, "params": json.loads(body)})

    def submission(self, job: str, lines: Sequence[bytes], file: str) -> bytes:
        """Return the body that makes a job."""
        return b'{"requests":[%s]}' % b",".join(lines)

    def results(self, row: dict[str, Any]) -> list[str]:
        """Return the path of an ended job's results, at the address that has our key."""
        return [f"{self.path}/{quote(str(row.get('id')), safe='')}/results"]

    def read(self, row: dict[str, Any]) -> Result:
        """Read a line of the results."""
        name, result = str(row.get("custom_id")), row.get("result")
        result = result if isinstance(result, dict) else {}
        kind, error = result.get("type"), result.get("error")
        if kind == "succeeded":
            return Result(name, 200, canonical(result.get("message")))
        if kind in ("expired", "canceled"):
            return Result(name, None, b"")
        status = status_like(error_of(error)[1], 500)
        return Result(name, status, canonical(error))


def is_reply(data: bytes) -> bool:
    """Tell a file, a job or a list of jobs from what is none."""
    try:
        return bool({"id", "data"} & read_object(data).keys())
    except ValueError:
        return False


def read_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises ValueError where it is none."""
    value = load_json(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def status_of(row: dict[str, Any]) -> str:
    """Return how far a job is; some write it in capitals."""
    return str(row.get("processing_status") or row.get("status")).lower()


def counts_of(row: dict[str, Any]) -> dict[str, int]:
    """Return how many requests of a job there are of each kind."""
    counts = row.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    return {name: number for name, number in counts.items() if isinstance(number, int)}
