"""Private text in documents: addresses, numbers and keys, masked before any prompt is made.

What has the form of a private thing and passes its check becomes `[EMAIL]`, `[PHONE]` and so on;
keys are those of configs/tables/secret_patterns.yaml. What standards set aside for examples stays.
Names and postal addresses are not looked for. Every pattern is bounded: hostile text takes linear
time.
"""

import re
from collections import Counter
from collections.abc import Iterator

from distill import shipped_table
from distill.records import Document
from distill.secret_patterns import Form, forms_in

TABLE = shipped_table("private_text.yaml")
EXAMPLES = re.compile(
    r"(?:^|\.)(?:example(?:\.\w{2,3})?|test|invalid|localhost|local|domain\.com)$", re.I
)
HOST = re.compile(r"[\w.-]{1,253}")

LOGIN, MESSAGE_ID = re.compile(r"://[^\s/@]*$"), re.compile(r"\d+\.\d+\.\d+@")
NANP = re.compile(r"1[2-9]\d\d[2-9]\d{6}")


def is_email(match: re.Match[str]) -> bool:
    """Leave the domains of examples, the login of an address, and the numbers of a Message-ID."""
    login = LOGIN.search(match.string[max(0, match.start() - 70) : match.start()])
    return not (login or EXAMPLES.search(match[1]) or MESSAGE_ID.match(match[0]))


def is_card(match: re.Match[str]) -> bool:
    """Check issuer and Luhn's sum (ISO/IEC 7812)."""
    digits = [int(c) for c in match[0] if c.isdigit()]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    issuer = re.fullmatch(TABLE["card_issuers"], "".join(map(str, digits)))
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


CHECKS = {"email": is_email, "iban": is_iban, "card": is_card, "phone": is_phone}
IBANS = "|".join(
    rf"(?:{countries.replace(' ', '|')})\d\d(?: ?[A-Z0-9]){{{int(length) - 4}}}"
    for length, countries in TABLE["iban_lengths"].items()
)


def read_forms() -> Iterator[tuple[re.Pattern[str], Form]]:
    """Yield what must stand in a text before it is searched for a form, and the form."""
    for kind, row in TABLE["forms"].items():
        pattern = row["pattern"].replace("<iban>", IBANS).replace("<code>", TABLE["calling_codes"])
        yield re.compile(row["sign"]), Form(kind, (), re.compile(pattern), CHECKS[kind], kind)


PERSONAL = list(read_forms())


def mask(text: str) -> tuple[str, Counter[str]]:
    """Put `[KIND]` for each private thing; return the text and the counts."""
    counts: Counter[str] = Counter()
    personal = [form for sign, form in PERSONAL if sign.search(text)]
    for form in [*forms_in(text), *personal]:  # keys hold digits

        def replace(match: re.Match[str], form: Form = form) -> str:
            text = match[0]
            host = HOST.match(match.string, match.end())
            example = form.kind == "password" and (host is None or EXAMPLES.search(host[0]))
            if not form.check(match) or example:  # which the address of a password can be
                return text
            counts[form.kind] += 1
            if form.kind == "password":  # with the user before it
                return "[PASSWORD]@"
            group = form.pattern.groups if form.kind == "key" else 0
            start, end = (place - match.start() for place in match.span(group))
            return f"{text[:start]}[{form.kind.upper()}]{text[end:]}"

        text = form.pattern.sub(replace, text)
    return text, counts


def mask_document(document: Document) -> tuple[Document, Counter[str]]:
    """Return a document with all but the user's `id` masked, and the counts by kind."""
    in_values, in_turns = Counter[str](), Counter[str]()

    def masked(value: object, counts: Counter[str]) -> object:
        if isinstance(value, list):
            return [masked(one, counts) for one in value]
        if isinstance(value, dict):
            return {key: masked(one, counts) for key, one in value.items()}
        if isinstance(value, str):
            value, more = mask(value)
            counts.update(more)
        return value

    text, counts = mask(document.text)
    meta = {
        key: value if key == "id" else masked(value, in_turns if key == "messages" else in_values)
        for key, value in document.meta.items()
    }
    counts = (counts or in_turns) + in_values
    return (Document.make(text, document.source, meta) if counts else document), counts
