"""How figures are written, and that text from outside stays text in Markdown and HTML."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distill import formatting
from distill.formatting import (
    INTERVAL,
    escape_markdown,
    estimate,
    markdown_table,
    money,
    share,
    verbatim,
)


def test_figures_are_written_in_one_way() -> None:
    assert money(None) == share(None) == formatting.figure(None) == "–"
    assert [money(v) for v in (0.7, -0.0042, 0.0, 0.00861)] == [
        "$0.70",
        "−$0.0042",
        "$0.00",
        "$0.0086",
    ]
    assert formatting.duration(7300) == "2.0 h" and formatting.count(12345.6) == "12,346"
    assert json.dumps(formatting.plain_numbers({"a": [True, 1 / 3]})) == '{"a": [true, 0.333333]}'


@pytest.mark.parametrize(
    ("ends", "undecided", "text"),
    [
        ((None, 1, 2), False, "–"),
        ((0.5, None, None), False, "50\u00a0% x"),
        ((0.5, None, None), True, "50\u00a0% x (undecided)"),
        ((0.5, 0.25, 1), False, "50\u00a0% x [25\u00a0%,\u00a0100\u00a0%]"),
        ((0.5, 0.25, 1), True, "50\u00a0% x (undecided)"),
        ((0.5, -0.25, 1), True, "50\u00a0% x [−25\u00a0%,\u00a0100\u00a0%]"),
    ],
)
def test_an_interval_never_claims_more_than_is_decided(
    ends: tuple[float | None, float | None, float | None], undecided: bool, text: str
) -> None:
    assert estimate(*ends, share, " x", undecided) == text


@given(st.text())
@example("[1](javascript:x)")
@example("[1]: http://x")
@example("_a_ b_c [−1.5, +2 %]")
def test_escaped_text_is_one_line_without_markup(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped and "<" not in escaped
    links = re.sub(INTERVAL, "", escaped)
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]]", links)
    assert not re.match(r"[-+=#]+(\s|$)", escaped)


def test_what_is_no_markup_stays_readable() -> None:
    text = "api_json: 3 & 4 [−1.5, +2 %], [46 min, 1.2 h]!"
    assert escape_markdown(text) == text
    assert escape_markdown("_a_ &lt; [x]") == "\\_a\\_ &amp;lt; \\[x\\]"


def test_a_verbatim_text_cannot_leave_its_block() -> None:
    block = verbatim("</pre>\n# `x` [a](b)")
    assert block.count("</pre>") == 1 and "\n  # &#96;x&#96;" in block and "[" not in block


def test_a_table_keeps_its_columns_and_lines() -> None:
    table = markdown_table(("a", "b"), [("x | y\nz", "1")])
    assert table == "| a        |   b |\n| -------- | --: |\n| x \\| y z |   1 |"
