"""Upload a release or a data set to the Hub: validated, in one commit with a tag, private until it
is complete."""

from itertools import count
from pathlib import Path
from typing import Literal

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from distill.config.values import MODEL
from distill.errors import DistillError, Exit
from distill.storage.progress import say


def push(
    release: Path,
    repository: str,
    public: bool = False,
    kind: Literal["model", "dataset"] = "model",
) -> str:
    """Upload the folder in one commit and return its address; a second call uploads changes only.

    Each commit gets the next tag of v1, v2, ...; it deletes rows that a data set no longer has.

    Raises DistillError (exit 9) with the Hub's reason; the repository then holds what it held.
    """
    check_name(repository)
    if not get_token():
        raise DistillError(Exit.PUBLISH, repository, "no token for the Hub", "set HF_TOKEN")
    api = HfApi(library_name="distill")
    try:
        RepoCard.load(release / "README.md", repo_type=kind).validate(repo_type=kind)
        api.create_repo(repository, private=True, exist_ok=True, repo_type=kind)
        if not api.repo_info(repository, repo_type=kind).private and not public:
            fix = "say --public, or take another name"
            raise DistillError(Exit.PUBLISH, repository, "is public", fix)
        files = {p.relative_to(release).as_posix(): p for p in release.rglob("*") if p.is_file()}
        there = api.list_repo_files(repository, repo_type=kind) if kind == "dataset" else ()
        rows = (name for name in there if name.endswith(".jsonl"))
        gone = [CommitOperationDelete(name) for name in rows if name not in files]
        changes = [*(CommitOperationAdd(*file) for file in sorted(files.items())), *gone]
        commit = api.create_commit(repository, changes, commit_message="Publish", repo_type=kind)
        tags = api.list_repo_refs(repository, repo_type=kind).tags
        if commit.oid not in {tag.target_commit for tag in tags}:
            names = {tag.name for tag in tags}
            tag = next(name for n in count(1) if (name := f"v{n}") not in names)
            api.create_tag(repository, tag=tag, revision=commit.oid, repo_type=kind)
        if public:
            api.update_repo_settings(repository, private=False, repo_type=kind)
    except (HfHubHTTPError, HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        fix = "check the connection, then run the same command again"
        if isinstance(cause, HfHubHTTPError) and 400 <= cause.response.status_code < 500:
            fix = "check OWNER/NAME, whether HF_TOKEN may write there, and the account's storage"
        what = f"not published: {' '.join(str(cause).split())[:200] or type(cause).__name__}"
        raise DistillError(Exit.PUBLISH, repository, what, fix) from None
    say(f"published {'publicly' if public else 'privately'}: {commit.commit_url}")
    return commit.commit_url


def check_name(repository: str) -> None:
    """Refuse what is no OWNER/NAME; raises DistillError (exit 9)."""
    if not MODEL.fullmatch(repository) or "/" not in repository:
        where = f"--push {repository[:60]!r}"
        raise DistillError(Exit.PUBLISH, where, "not OWNER/NAME", "name both")
