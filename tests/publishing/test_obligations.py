"""What a release owes: the duties of teacher and base, and those that stop it."""

from pathlib import Path

import pytest

from distill.config.teachers import LocalTeacher
from distill.errors import DistillError, Exit
from distill.publishing.obligations import Owed, license_of, obligations, write_notices


def owed_by(teacher: str, student: str = "smollm2-135m-instruct") -> tuple[Owed, ...]:
    return obligations(LocalTeacher(model=teacher), student, None)[1]


def displays(owed: tuple[Owed, ...]) -> list[str]:
    return [one.duties.display for one in owed if one.duties.display]


def test_a_teacher_s_outputs_owe_less_than_a_base_s_weights() -> None:
    llama = "meta-llama/Llama-3.2-1B-Instruct"
    assert owed_by("qwen2.5-coder-0.5b-instruct") == (), "open models ask for nothing"
    assert displays(owed_by("Qwen/Qwen2.5-72B-Instruct")) == ["Improved using Qwen"]
    taught = owed_by(llama)
    assert [one.duties.name for one in taught] == ["Llama"] and not displays(taught)
    made = owed_by("Qwen/Qwen3-8B", llama)
    assert displays(made) == ["Built with Llama"]
    license = license_of(llama, "llama3.2", made)
    assert license.name == "llama3.2" and license.owed
    assert any(one.duties.notice for one in made)


def test_an_owed_license_wins_over_the_base_s_and_not_over_another_stated_one() -> None:
    owed, base = owed_by("google/gemma-2-9b-it"), "smollm2-135m-instruct"
    license = license_of(base, None, owed)
    assert license.name == "gemma" and license.owed and not license.stated
    assert "Apache License" in license.text and "is distributed under gemma" in license.text
    assert license_of(base, "Gemma", owed).name == "gemma"
    assert license_of(base, "MIT", ())[:3] == ("MIT", True, False)
    with pytest.raises(DistillError, match="gemma is required by") as caught:
        license_of(base, "MIT", owed)
    assert caught.value.code == Exit.TERMS


def test_the_copy_of_an_agreement_is_a_plain_file(tmp_path: Path) -> None:
    owed = owed_by("google/gemma-2-9b-it")
    (tmp_path / "real").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for agreement in (None, tmp_path / "none", tmp_path / "link", tmp_path):
        with pytest.raises(DistillError, match="a copy of the agreement") as caught:
            write_notices(owed, agreement, tmp_path)
        assert caught.value.code == Exit.TERMS
    write_notices(owed, tmp_path / "real", tmp_path)
    assert (tmp_path / "AGREEMENT.txt").read_text() == "text"
    assert (tmp_path / "NOTICE").read_text().endswith("ai.google.dev/gemma/terms\n")
