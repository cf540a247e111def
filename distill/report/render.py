"""The templates, and the parts of scorecard.md that they make.

Python computes, the templates of `templates/` word. Whatever a template writes is escaped for its
medium, so text of a model, a corpus or a config cannot forge structure.
"""

import json
import re
from functools import cache, partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.runtime import Macro
from markupsafe import Markup

from distill import formatting
from distill.evaluation.measurements import DuelRow
from distill.evaluation.scorecard import Costs, Scorecard
from distill.evaluation.statistics import Conclusion, conclude
from distill.report import tables

SAVINGS = (
    *("substitution", "saving_at_length", "no_cascade", "break_even_at_length"),
    *("hypothetical", "machine"),
)
PARAGRAPHS = re.compile(r"\n{3,}")


@cache
def environment(markdown: bool) -> Environment:
    """Return the templates for Markdown or HTML, with the sentences that both share as `say`."""

    def text(value: object) -> object:
        """Write what is unknown as a dash; escape for Markdown (HTML is escaped by jinja)."""
        value = formatting.UNKNOWN if value is None else value
        if not markdown or isinstance(value, Markup):
            return value
        return Markup(formatting.escape_markdown(value))

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=text,
    )
    templates.filters["plain"] = formatting.plain
    templates.filters["verbatim"] = lambda text: Markup(formatting.verbatim(text))
    templates.filters["quoted"] = lambda text: Markup(
        json.dumps(formatting.one_line(text), ensure_ascii=False)
    )
    functions = (cost_share, missing, preference, prices)
    templates.globals |= vars(formatting) | vars(tables) | {f.__name__: f for f in functions}
    templates.globals["tables"] = tables
    templates.globals["grid"] = lambda table: Markup(formatting.markdown_table(*table))

    def sentence(macro: Macro, *arguments: object) -> Markup:
        return Markup(re.sub(r"[ \n]+", " ", macro(*arguments)).strip())

    macros = vars(templates.get_template("sentences.j2").module)
    say = {k: partial(sentence, m) for k, m in macros.items() if isinstance(m, Macro)}
    templates.globals["say"] = say
    templates.globals["savings"] = lambda e: [s for name in SAVINGS if (s := say[name](e))]
    return templates


def cost_share(costs: Costs) -> tuple[float, str] | None:
    """Return the student's share of what a request takes of the teacher: of its cost, else time."""
    dollars = (costs.student.dollars_per_1k, costs.teacher.dollars_per_1k)
    seconds = (costs.student.seconds_per_1k, costs.teacher.seconds_per_1k)
    for (student, teacher), unit in ((dollars, "cost"), (seconds, "time")):
        if student is not None and teacher is not None and teacher > 0:
            return float(student) / float(teacher), unit
    return None


def preference(duels: DuelRow) -> Conclusion:
    """Decide which of two a judge prefers: its win rate against a half, by the rule of claims."""
    low, high = (None if x is None else x - 0.5 for x in (duels.win_rate.low, duels.win_rate.high))
    return conclude(low, high, duels.documents, None, duels.n, duels.win_rate.reason)


def prices(card: Scorecard) -> list[str]:
    """Return every price that a figure rests on, with its date and source, once."""
    cost, economics = card.cost, card.economics
    priced = [cost.teacher, cost.base, cost.student, cost.distillation]
    used = [*priced, *((economics.teacher, economics.student) if economics else ())]
    return list(dict.fromkeys(one.price for one in used if one.price))


def missing(card: Scorecard) -> list[tuple[str, list[str]]]:
    """Return each reason with all that is missing because of it."""
    reasons = dict.fromkeys(card.reasons.values())
    return [(why, [path for path, r in card.reasons.items() if r == why]) for why in reasons]


def parts(card: Scorecard) -> dict[str, str]:
    """Return the parts of scorecard.md by name, those that an old scorecard lacks empty."""
    template = environment(markdown=True).get_template("scorecard.md.j2")
    context = template.new_context({"card": card})
    texts = {name: "".join(block(context)) for name, block in template.blocks.items()}
    return {name: PARAGRAPHS.sub("\n\n", text).strip() for name, text in texts.items()}
