"""Private text in documents: addresses, numbers and keys, masked before any prompt is made.

What has the form of a private thing and passes its check becomes `[EMAIL]`, `[PHONE]` and so on;
keys are those of configs/secret_patterns.yaml. What standards set aside for examples stays. Names
and postal addresses are not looked for. Every pattern is bounded: hostile text takes linear time.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from distill.records import Document
from distill.secret_patterns import Form, forms_in

EXAMPLES = re.compile(
    r"(?:^|\.)(?:example(?:\.\w{2,3})?|test|invalid|localhost|local|domain\.com)$", re.I
)
HOST = re.compile(r"[\w.-]{1,253}")

EMAIL = re.compile(
    r"(?<![\w.+%-])(?!git@)[A-Za-z0-9_][\w.+%-]{0,63}"
    r"@((?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,24})(?![\w@-])"
)
LOGIN, MESSAGE_ID = re.compile(r"://[^\s/@]*$"), re.compile(r"\d+\.\d+\.\d+@")
DIGITS = r"(?<![\w.,+/=-])"
CARD = re.compile(
    DIGITS
    + r"(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -]?)\d{6}\2\d{5}|\d{13,19})(?![\w-]|[.,]\d)"
)
ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d|2\d\d)\d{12}"
)
LENGTHS = {  # of the IBANs of each country, by the SWIFT registry
    15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS", 23: "AE GI IL", 26: "IS TR",
    24: "AD CZ ES MD PK RO SA SE SK TN", 27: "FR GR IT MC SM", 28: "AL AZ CY DO GT HU LB PL",
    29: "BR PS QA UA", 31: "MT",
}  # fmt: skip
IBAN = re.compile(
    r"(?<![\w-])(?=[A-Z]{2}\d\d)(?:"
    + "|".join(
        rf"(?:{countries.replace(' ', '|')})\d\d(?: ?[A-Z0-9]){{{length - 4}}}"
        for length, countries in LENGTHS.items()
    )
    + r")(?![\w-])"
)
COUNTRY = (  # calling codes of ITU-T E.164
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-69]\d|35\d|37\d|38\d|42[013]|50\d|59\d|6[79]\d|800|85\d|88\d|96\d|97\d|99\d)"
)
PHONE = re.compile(
    r"(?<![\w.,/=~-])\+" + COUNTRY + r"(?:[ .-]?\(0?\d{1,4}\))?(?:[ .-]?\d){5,13}+(?!\w|[.,]\d)"
    r"|"
    + DIGITS
    + r"(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[.-]|[2-9]\d\d([.-])[2-9]\d\d\1)\d{4}(?![\w-]|[.,]\d)"
    r"|(?i:\b(?:tel|phone|telephone|fax|mobile)\b\.?[:=]? {0,2})"
    r"\(?0\d{1,5}\)?(?:[ ./-]{0,2}\d){5,12}+(?!\w)"
)
NANP = re.compile(r"1[2-9]\d\d[2-9]\d{6}")


def is_email(match: re.Match[str]) -> bool:
    """Leave the domains of examples, the login of an address, and the numbers of a Message-ID."""
    login = LOGIN.search(match.string[max(0, match.start() - 70) : match.start()])
    return not (login or EXAMPLES.search(match[1]) or MESSAGE_ID.match(match[0]))


def is_example_host(match: re.Match[str]) -> bool:
    """Tell whether the address that a password is for is an example."""
    host = HOST.match(match.string, match.end())
    return host is None or EXAMPLES.search(host[0]) is not None


def is_card(match: re.Match[str]) -> bool:
    """Check issuer and Luhn's sum (ISO/IEC 7812)."""
    digits = [int(c) for c in match[0] if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    issuer = ISSUERS.fullmatch("".join(map(str, digits)))
    return bool(issuer) and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def is_iban(match: re.Match[str]) -> bool:
    """Check the sum modulo 97 (ISO 7064)."""
    text = match[0].replace(" ", "")
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def is_phone(match: re.Match[str]) -> bool:
    """Check the count of digits (ITU-T E.164), and leave the numbers that are kept for fiction."""
    digits = "".join(c for c in match[0] if c.isdigit())
    if match[0].startswith("+1") and not NANP.fullmatch(digits):
        return False
    if re.fullmatch(r"\+\d+\.\d+", match[0]):  # a decimal number with its sign
        return False
    most = 13 if match[0][1:].isdigit() else 15  # longer and unbroken, it is a date or a counter
    return 7 <= len(digits) <= most and not re.search(r"55501\d\d$", digits)


# What must stand in a text before it is searched for a form, and the form.
PERSONAL = {
    "email": (re.compile("@"), EMAIL, is_email),
    "iban": (re.compile(r"[A-Z]{2}\d\d ?[A-Z0-9]{4}"), IBAN, is_iban),
    "card": (re.compile(r"\d{4}[ -]?\d{4}"), CARD, is_card),
    "phone": (re.compile(r"\d{4}|\d{3}\D{1,2}\d{3}|\+\d|0\d"), PHONE, is_phone),
}
FORMS = [Form(kind, (), pattern, check, kind) for kind, (_, pattern, check) in PERSONAL.items()]
TOGETHER = 64  # documents in which signs are looked for at once


def may_hold(text: str, form: Form) -> bool:
    """Tell whether what must stand in a text for a form to match does."""
    if form.name in PERSONAL:
        return PERSONAL[form.name][0].search(text) is not None
    return any(sign in text for sign in form.signs)


def mask(text: str, forms: Iterable[Form] | None = None) -> tuple[str, Counter[str]]:
    """Put `[KIND]` for each private thing, of some forms or all; return the text and the counts."""
    counts: Counter[str] = Counter()
    for form in [*forms_in(text), *FORMS] if forms is None else forms:  # keys hold digits

        def replace(match: re.Match[str], form: Form = form) -> str:
            text = match[0]
            if not form.check(match) or (form.kind == "password" and is_example_host(match)):
                return text
            counts[form.kind] += 1
            if form.kind == "password":  # with the user before it
                return "[PASSWORD]@"
            group = form.pattern.groups if form.kind == "key" else 0
            start, end = (place - match.start() for place in match.span(group))
            return f"{text[:start]}[{form.kind.upper()}]{text[end:]}"

        text = form.pattern.sub(replace, text)
    return text, counts


def mask_documents(documents: Iterable[Document]) -> Iterator[tuple[Document, Counter[str]]]:
    """Yield each document with all but the user's `id` masked, and the counts by kind."""
    documents = iter(documents)
    while batch := [*islice(documents, TOGETHER)]:
        texts = [all_text(document) for document in batch]
        forms = [*forms_in("\n".join(texts)), *FORMS]
        for document, text in zip(batch, texts, strict=True):
            present = [form for form in forms if may_hold(text, form)]
            yield mask_document(document, present) if present else (document, Counter())


def all_text(document: Document) -> str:
    """Return all that is masked of a document: what stands in one text of it stands in this."""
    values = [v for k, v in document.meta.items() if isinstance(v, str) and k != "id"]
    dicts = (*document.recorded_answers, *document.meta.get("messages", []))
    return "\n".join((document.text, *values, *(text for one in dicts for text in one.values())))


def mask_document(document: Document, forms: Sequence[Form]) -> tuple[Document, Counter[str]]:
    """Return the document with what fits the forms masked, and the counts by kind."""
    in_values, in_turns = Counter[str](), Counter[str]()

    def masked(value: object, counts: Counter[str]) -> object:
        if isinstance(value, list):
            return [masked(one, counts) for one in value]
        if isinstance(value, dict):
            return {key: masked(one, counts) for key, one in value.items()}
        if isinstance(value, str):
            value, more = mask(value, forms)
            counts.update(more)
        return value

    text, counts = mask(document.text, forms)
    meta = {
        key: value if key == "id" else masked(value, in_turns if key == "messages" else in_values)
        for key, value in document.meta.items()
    }
    counts = (counts or in_turns) + in_values
    return (Document.make(text, document.source, meta) if counts else document), counts
