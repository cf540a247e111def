"""The scanner: what must not be published is found and never echoed; documentation passes."""

import pytest

from distill.errors import DistillError, Exit
from distill.publishing.secret_scan import scan


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("README.md", "line\nhf_" + "a" * 34, "a secret"),
        ("scorecard.json", '{"path": "/home/ann/corpus"}', "home folder"),
        ("scorecard.json", r'{"path": "C:\\Users\\ann\\corpus"}', "home folder"),
        ("report.html", "https://ann:s3cr3t@example.org/x.git", "credentials"),
        ("report.html", "see /srv/private/run/7", "path of this machine"),
        ("LICENSE", "canary-value-of-a-key", "$CANARY_API_KEY"),
        ("adapter/adapter_model.safetensors", "\0\1\0\0\0\0\0\0 /home/ann/x/", "home folder"),
    ],
)
def test_the_scanner_finds(tmp_path, monkeypatch, name, text, what):
    monkeypatch.setenv("CANARY_API_KEY", "canary-value-of-a-key")
    (tmp_path / "adapter").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(DistillError) as caught:
        scan(tmp_path, ("/srv/private/run",))
    assert caught.value.code == Exit.PUBLISH and what in caught.value.what
    assert text.strip() not in str(caught.value)


def test_the_scanner_passes_documentation(tmp_path):
    (tmp_path / "report.html").write_text(
        "open /home/you/x and ftp://user:password@host/ and hf_hub_download"
    )
    scan(tmp_path)
