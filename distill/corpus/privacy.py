"""Private text in documents: addresses, numbers and keys are masked before any prompt is made of them.

Masked is what has the form of a private thing and passes its check (Luhn for cards, ISO 7064 for IBANs); the forms of keys
are those of `distill.secret_patterns`. What standards set aside for examples (example.org, 555-0100, `password`) stays, so that documentation stays readable. A mask is
`[EMAIL]`, `[PHONE]` and so on. Patterns cannot find all private text: names and postal addresses are not looked for.
Every pattern is bounded, so that hostile text is read in linear time.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from distill.records import Document
from distill.secret_patterns import ADDRESS_PASSWORD, FIRST, LATER, mask_secrets

Policy = Literal["mask", "drop", "keep"]
EXAMPLES = re.compile(
    r"(?:^|\.)(?:example(?:\.\w{2,3})?|test|invalid|localhost|local|domain\.com)$", re.I
)
HOST = re.compile(r"[\w.-]{1,253}")

EMAIL = re.compile(
    r"(?<![\w.+%-])(?!git@)[A-Za-z0-9_][\w.+%-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.){1,6}[A-Za-z]{2,24})(?![\w@-])"
)
LOGIN, MESSAGE_ID = re.compile(r"://[^\s/@]*$"), re.compile(r"\d+\.\d+\.\d+@")
DIGITS = r"(?<![\w.,+/=-])"
CARD = re.compile(
    DIGITS
    + r"(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -]?)\d{6}\2\d{5}|\d{13,19})(?![\w-]|[.,]\d)"
)
ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d|2\d\d)\d{12}"
)
LENGTHS = {  # of the IBANs of each country, by the SWIFT registry
    15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS", 23: "AE GI IL", 24: "AD CZ ES MD PK RO SA SE SK TN", 26: "IS TR",
    27: "FR GR IT MC SM", 28: "AL AZ CY DO GT HU LB PL", 29: "BR PS QA UA", 31: "MT",
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
    r"|(?i:\b(?:tel|phone|telephone|fax|mobile)\b\.?[:=]? {0,2})\(?0\d{1,5}\)?(?:[ ./-]{0,2}\d){5,12}+(?!\w)"
)
NANP = re.compile(r"1[2-9]\d\d[2-9]\d{6}")


def is_email(match: re.Match[str]) -> bool:
    """Leave the domains that are kept for examples, the login of an address, and the numbers of a Message-ID."""
    login = LOGIN.search(match.string[max(0, match.start() - 70) : match.start()])
    return not (login or EXAMPLES.search(match[1]) or MESSAGE_ID.match(match[0]))


def is_password(match: re.Match[str]) -> bool:
    """Leave placeholders, and the logins of example domains."""
    host = HOST.match(match.string, match.end())
    return ADDRESS_PASSWORD.is_one(match) and bool(host) and not EXAMPLES.search(host[0])


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


AT, LINK = re.compile("@"), re.compile("://")
NUMBER = re.compile(r"\d{4}|\d{3}\D{1,2}\d{3}|\+\d|0\d")
Check = Callable[[re.Match[str]], bool]
Rule = tuple[str, re.Pattern[str], re.Pattern[str], Check]
RULES: tuple[Rule, ...] = (  # kind, what must stand in the text, form, check
    ("PASSWORD", LINK, ADDRESS_PASSWORD.pattern, is_password),
    ("EMAIL", AT, EMAIL, is_email),
    ("IBAN", re.compile(r"[A-Z]{2}\d\d ?[A-Z0-9]{4}"), IBAN, is_iban),
    ("CARD", re.compile(r"\d{4}[ -]?\d{4}"), CARD, is_card),
    ("PHONE", NUMBER, PHONE, is_phone),
)


def mask(text: str) -> tuple[str, Counter[str]]:
    """Return the text with `[KIND]` for each private thing, and how many there were of each kind."""
    counts: Counter[str] = Counter()
    # Keys come first, since they hold digits. The forms that were known before there was a list come before the
    # password of an address, the others after it: so a text is masked as it always was.
    for forms, rules in ((FIRST, RULES[:1]), (LATER, RULES[1:])):
        text, keys = mask_secrets(text, forms, "[KEY]")
        counts["key"] += keys
        for kind, sign, form, check in rules:
            if not sign.search(text):
                continue

            def masked(match: re.Match[str], kind: str = kind, check: Check = check) -> str:
                if not check(match):
                    return match[0]
                counts[kind.lower()] += 1
                return f"[{kind}]@" if kind == "PASSWORD" else f"[{kind}]"

            text = form.sub(masked, text)
    return text, +counts


def masked_tree(value: Any) -> tuple[Any, Counter[str]]:
    """Mask every text in nested lists and mappings, but no key of a mapping."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        children, counts = masked_tree(list(value.values()))
        return dict(zip(value, children, strict=True)), counts
    if isinstance(value, list):
        items = [masked_tree(child) for child in value]
        return [new for new, _ in items], sum((counts for _, counts in items), Counter[str]())
    return value, Counter()


def masked_document(document: Document) -> tuple[Document, Counter[str]]:
    """Return the document with its text and values masked, and the counts; one without private text is the same.

    The user's own `id` stays as it is; the turns of a conversation count once, in the text.
    """
    text, counts = mask(document.text)
    meta, in_turns, in_others = dict(document.meta), Counter[str](), Counter[str]()
    for key, value in document.meta.items():
        if key == "messages":
            meta[key], in_turns = masked_tree(value)
        elif key != "id":
            meta[key], new = masked_tree(value)
            in_others += new
    if not counts and not in_turns and not in_others:
        return document, Counter()
    return Document.make(text, document.source, meta), (counts or in_turns) + in_others
