"""Say from pip's report which build of torch it will take, and how much it will download:
`torch_size.py REPORT`."""

import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


def size(url: str) -> int | None:
    """Return a file's size in bytes, from the disk or from the index's answer; None where it does
    not say."""
    if url.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path)).stat().st_size
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.headers["Content-Length"])
    except (urllib.error.URLError, OSError, TypeError, ValueError):
        return None


def main(report: Path) -> None:
    """Print one line: torch's version and build, the packages that come with it, the size of
    all."""
    files = json.loads(report.read_text(encoding="utf-8"))["install"]
    if not files:
        print("torch: is installed already")
        return
    torch = next(file for file in files if file["metadata"]["name"] == "torch")
    known = [size(file["download_info"]["url"]) for file in files]
    more = f" and {len(files) - 1} packages that it needs" if len(files) > 1 else ""
    kind = "CUDA build" if any("cudnn" in f["metadata"]["name"] for f in files) else "build"
    wheel = urllib.parse.unquote(torch["download_info"]["url"].rsplit("/", 1)[-1])
    print(f"torch {torch['metadata']['version']}, {kind} {wheel}{more}: {in_words(known)}")
    print("(TORCH_INDEX=URL takes torch from another package index; see the README)")


def in_words(sizes: list[int | None]) -> str:
    """Return the sum of what is known of the sizes."""
    known = [size for size in sizes if size is not None]
    if not known:
        return "size not known"
    return f"{'at least ' if len(known) < len(sizes) else ''}{sum(known) / 1e6:,.0f} MB"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
