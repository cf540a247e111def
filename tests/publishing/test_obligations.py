"""What a release owes: the duties of teacher and base, and those that stop it."""

import pytest

from distill.config.teachers import LocalTeacher
from distill.errors import DistillError, Exit
from distill.publishing.obligations import Owed, license_of, obligations


def owed_by(teacher: str, student: str = "smollm2-135m-instruct") -> tuple[Owed, ...]:
    return obligations(LocalTeacher(model=teacher), student, None)[1]


def test_a_teacher_s_outputs_owe_less_than_a_base_s_weights() -> None:
    llama = "meta-llama/Llama-3.2-1B-Instruct"
    assert owed_by("qwen2.5-coder-0.5b-instruct") == (), "open models ask for nothing"
    (qwen,), (taught,) = owed_by("Qwen/Qwen2.5-72B-Instruct"), owed_by(llama)
    assert qwen.duties.display == "Improved using Qwen"
    assert taught.duties.name == "Llama" and not taught.duties.display
    made = owed_by("Qwen/Qwen3-8B", llama)
    assert [o.duties.display for o in made if o.duties.display] == ["Built with Llama"]
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
