"""Uploading: one commit, private until complete, one clear line for every refusal."""

import pytest
import torch
from safetensors.torch import save_file

from distill.errors import DistillError, Exit
from distill.publishing.upload import push
from tests.support.fake_hub import TOKEN, fake_hub, use_hub

CARD = "---\nlicense: mit\nbase_model: acme/base\n---\n\n# A student\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub() as server:
        use_hub(monkeypatch, server, tmp_path / "hub-cache")
        yield server


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    (folder / "adapter").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    save_file({"a": torch.arange(1000.0)}, folder / "model.safetensors")
    save_file({"b": torch.arange(10.0)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def refused(release, repository="me/student", public=False) -> DistillError:
    with pytest.raises(DistillError) as caught:
        push(release, repository, public)
    assert caught.value.code == Exit.PUBLISH
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return caught.value


def test_one_private_commit_and_again_nothing(hub, release):
    address = push(release, "me/student")
    repository = hub.repositories["me/student"]
    assert repository.private and address.endswith(repository.sha)
    assert len(repository.commits) == 2  # the empty one, and ours
    for name in ("README.md", "model.safetensors", "adapter/adapter_model.safetensors"):
        assert repository.files[name] == (release / name).read_bytes()
    assert hub.requests.index("POST /api/validate-yaml") < hub.requests.index(
        "POST /api/repos/create"
    )
    push(release, "me/student")
    assert len(repository.commits) == 2 and repository.tags == {"v1": repository.sha}
    (release / "README.md").write_text(CARD + "It is better now.\n")
    hub.fail = {"POST /api/models/me/student/tag": [403]}
    refused(release)
    push(release, "me/student")  # which has only the tag left to do
    assert len(repository.commits) == 3 and repository.tags["v2"] == repository.sha


def test_public_only_when_asked_and_only_when_complete(hub, release):
    hub.fail = {"POST /api/models/me/student/commit": [403]}
    refused(release, public=True)
    assert hub.repositories["me/student"].private
    push(release, "me/student", public=True)
    assert not hub.repositories["me/student"].private
    assert "is public" in refused(release).what


@pytest.mark.parametrize(
    ("request_line", "status", "words"),
    [
        ("POST /api/repos/create", 401, "401"),
        ("PUT /lfs/", 403, "403"),
        ("POST /me/student.git/info/lfs/objects/batch", 413, "413"),
        ("POST /api/models/me/student/commit", 409, "409"),
        ("POST /api/models/me/student/preupload", 400, "not published"),
        ("POST /api/validate-yaml", 400, "not published"),
    ],
)
def test_a_failure_leaves_nothing_and_the_same_call_goes_on(
    hub, release, request_line, status, words
):
    hub.fail = {request_line: [status]}
    assert words in refused(release).what
    assert "me/student" not in hub.repositories or not hub.repositories["me/student"].files
    push(release, "me/student")
    assert len(hub.repositories["me/student"].files) == 3


@pytest.mark.parametrize("name", ["student", "../x/y", "a/b/c", "a/b\n", "", "/a/b"])
def test_a_wrong_name_asks_nothing(hub, release, name):
    assert "OWNER/NAME" in refused(release, name).what
    assert hub.requests == []


def test_what_is_refused_before_anything_is_made(hub, release, monkeypatch):
    (release / "README.md").write_text(CARD.replace("acme/base", "/home/ann/base"))
    assert "base_model" in refused(release).what
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in refused(release).what
    assert "me/student" not in hub.repositories


def test_no_hub_at_all(release, tmp_path, monkeypatch):
    with fake_hub() as server:
        use_hub(monkeypatch, server, tmp_path / "hub-cache")
    assert "not published" in refused(release).what
