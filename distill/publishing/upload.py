"""Upload a release to the Hub: validated, in one commit, private until it is complete."""

from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from distill.config.values import MODEL
from distill.errors import DistillError, Exit
from distill.storage.progress import say


def push(release: Path, repository: str, public: bool = False) -> str:
    """Upload the folder in one commit and return its address; a second call uploads changes only.

    Raises DistillError (exit 9) with the Hub's reason; the repository then holds what it held.
    """
    check_name(repository)
    if not get_token():
        raise DistillError(Exit.PUBLISH, repository, "no token for the Hub", "set HF_TOKEN")
    api = HfApi(library_name="distill")
    try:
        ModelCard.load(release / "README.md").validate()
        api.create_repo(repository, private=True, exist_ok=True)
        if not api.repo_info(repository).private and not public:
            raise DistillError(
                Exit.PUBLISH, repository, "is public", "say --public, or take another name"
            )
        files = sorted(path for path in release.rglob("*") if path.is_file())
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path.relative_to(release).as_posix(), path) for path in files],
            commit_message="Publish",
        )
        if public:
            api.update_repo_settings(repository, private=False)
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
        raise DistillError(
            Exit.PUBLISH, f"--push {repository[:60]!r}", "not OWNER/NAME", "name both"
        )
