"""Which encoding a text file is in, read off its bytes; what is not recognised is refused.

UTF-8 is the rule, UTF-16 and UTF-32 are known by a byte-order mark or by their NUL bytes. An older
encoding counts as recognised where the bytes are valid in it and nearly all characters are those
that its language writes: kana in Japanese, the commoner half of the ideographs in Chinese, accented
letters beside plain ones in Western Europe.
"""

import codecs
import re
from functools import cache

SAMPLE = 2**18  # bytes from which an encoding is recognised
BOMS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
USUAL = re.compile(
    r"[\t\n\r -~\u00a0-\u06ff\u0900-\u0e7f\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
    r"\uff01-\uff5e]"
)
MULTIBYTE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
ACCENTED = (
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüßœšžÀÁÂÄÅÆÇÈÉÊËÍÎÑÓÔÖØÙÚÛÜŒŠŽ"  # no ð, ý, þ: of few languages
)
WESTERN = re.compile(
    rf"(?<=[a-zA-Z])[{ACCENTED}]{{1,2}}|[{ACCENTED}]{{1,2}}(?=[a-zA-Z])|(?<![^\W\d_])[àèéòùÀÉ](?![^\W\d_])"
    r"|[“”‘’„–—…•«»¡¿°§£€©®™\u00a0]"
)


@cache
def _legacy() -> tuple[tuple[str, str, frozenset[str], float], ...]:
    """Return codec, name, the characters that are frequent in its language, their least share."""

    def two_bytes(codec: str, first: int, last: int) -> frozenset[str]:
        pairs = (bytes((a, b)) for a in range(first, last + 1) for b in range(0x40, 0xFF))
        return frozenset("".join(pair.decode(codec, "ignore") for pair in pairs))

    kana, cyrillic = (
        frozenset(map(chr, range(0x3041, 0x30FF))),
        frozenset("абвгдежзийклмнопрстуфхцчшщъыьэюяё"),
    )
    return (
        ("cp932", "Shift-JIS", kana, 0.15),
        ("euc_jp", "EUC-JP", kana, 0.15),
        ("cp949", "EUC-KR", two_bytes("euc_kr", 0xB0, 0xC8), 0.9),
        ("gb18030", "GB18030", two_bytes("gb2312", 0xB0, 0xD7), 0.7),
        ("big5", "Big5", two_bytes("big5", 0xA4, 0xC6), 0.75),
        ("cp1251", "Windows-1251", cyrillic, 0.8),
        ("koi8_r", "KOI8-R", cyrillic, 0.8),
    )


def recognise(sample: bytes, complete: bool) -> tuple[str, str] | None:
    """Return the codec and the name of an encoding that is not UTF-8, or None.

    `complete` says that the sample is the whole file, so that no character is cut at its end.
    """
    for name, marks in BOMS.items():
        if sample.startswith(marks):
            return name, name
    text = _decode("utf-8", sample, complete)
    nuls = sample.count(0)
    if nuls and (text is None or nuls > len(sample) / 5):
        for codec in ("utf-16-le", "utf-16-be"):
            wide = _decode(codec, sample, complete)
            if wide and "\0" not in wide and _share(USUAL, wide) > 0.98:
                return codec, "UTF-16"
    if text is not None or nuls:
        return None
    # some damaged bytes in UTF-8 are no other encoding
    foreign = sum(byte > 127 for byte in sample)
    if 2 * sum(len(found) for found in MULTIBYTE.findall(sample)) > foreign:
        return None
    western = WESTERN.findall(_decode("cp1252", sample, complete) or "")
    if len("".join(western)) >= 0.95 * foreign:
        return "cp1252", "Windows-1252"
    for codec, name, frequent, least in _legacy():
        decoded = _decode(codec, sample, complete)
        characters = [one for one in decoded or "" if one > "\x7f"]
        if len(characters) < 4 or _share(USUAL, "".join(characters)) < 0.98:
            continue
        if sum(one in frequent for one in characters) >= least * len(characters):
            return codec, name
    return None


def _decode(codec: str, sample: bytes, complete: bool) -> str | None:
    try:
        return codecs.getincrementaldecoder(codec)().decode(sample, complete)
    except UnicodeDecodeError:
        return None


def _share(pattern: re.Pattern[str], text: str) -> float:
    return len(pattern.findall(text)) / max(1, len(text))
