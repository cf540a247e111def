"""Upload a release to the Hub: validated, in one commit, private until it is complete."""

from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from distill.config.values import MODEL
from distill.errors import DistillError, Exit
from distill.storage.progress import say

REASONS = {
    401: ("the token is not valid", "set HF_TOKEN to a token with write access"),
    402: ("the account may not create it", "see the account's plan"),
    403: ("the token may not write there", "use a token with write access to this owner"),
    404: ("the owner does not exist, or the token may not see it", "check OWNER/NAME"),
    409: ("somebody else is changing it", "run the same command again"),
    413: ("the upload is too large for the account", "see the account's storage"),
}


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
    except HfHubHTTPError as error:
        raise _explained(repository, error) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        raise _explained(repository, cause) from None
    say(f"published {'publicly' if public else 'privately'}: {commit.commit_url}")
    return commit.commit_url


def check_name(repository: str) -> None:
    """Refuse what is no OWNER/NAME; raises DistillError (exit 9)."""
    if not MODEL.fullmatch(repository) or "/" not in repository:
        raise DistillError(
            Exit.PUBLISH, f"--push {repository[:60]!r}", "not OWNER/NAME", "name both"
        )


def _explained(repository: str, error: BaseException) -> DistillError:
    """Turn what the Hub or the network said into one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in REASONS:
        return DistillError(Exit.PUBLISH, repository, *REASONS[status])
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DistillError(
        Exit.PUBLISH, repository, f"not published: {reason}", "run the same command again"
    )
