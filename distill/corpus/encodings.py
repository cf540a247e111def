"""Which encoding a text file is in, read off its bytes; what is not recognised is refused.

UTF-8 is the rule, UTF-16 and UTF-32 are known by a byte-order mark or by their NUL bytes. An older
encoding counts as recognised where the bytes are valid in it and nearly all characters are those
that its language writes: kana in Japanese, the commoner half of the ideographs in Chinese, accented
letters beside plain ones in Western Europe.
"""

import codecs
import re

ENOUGH = 20_000  # characters by which a language is known
SAMPLE = 2**18  # bytes from which an encoding is recognised
BOMS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
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


def _two_bytes(codec: str, first: int, last: int) -> frozenset[str]:
    pairs = (bytes((a, b)) for a in range(first, last + 1) for b in range(0x40, 0xFF))
    return frozenset("".join(pair.decode(codec, "ignore") for pair in pairs))


KANA = frozenset(map(chr, range(0x3041, 0x30FF)))
CYRILLIC = frozenset(map(chr, range(0x430, 0x450)))  # small letters
LEGACY = (  # codec, name, the characters that its language writes most, and their least share
    ("cp932", "Shift-JIS", KANA, 0.15),
    ("euc_jp", "EUC-JP", KANA, 0.15),
    ("cp949", "EUC-KR", _two_bytes("euc_kr", 0xB0, 0xC8), 0.9),
    ("gb18030", "GB18030", _two_bytes("gb2312", 0xB0, 0xD7), 0.7),
    ("big5", "Big5", _two_bytes("big5", 0xA4, 0xC6), 0.75),
    ("cp1251", "Windows-1251", CYRILLIC, 0.8),
    ("koi8_r", "KOI8-R", CYRILLIC, 0.8),
)


def recognise(sample: bytes, complete: bool, stated: str | None) -> tuple[str, str] | None:
    """Return the codec and the name of an encoding that is not UTF-8, or None.

    `complete` says that the sample is the whole file, so that no character is cut at its end;
    `stated` is the encoding where it is neither UTF-8 nor UTF-16.
    """

    def decode(codec: str) -> str:
        try:
            return codecs.getincrementaldecoder(codec)().decode(sample, complete)
        except UnicodeDecodeError:
            return ""

    for name, marks in BOMS.items():
        if sample.startswith(marks):
            return name, name
    unicode, nuls = decode("utf-8"), sample.count(0)
    if nuls and (not unicode or nuls > len(sample) / 5):
        for codec in ("utf-16-le", "utf-16-be"):
            wide = decode(codec)
            if "\0" not in wide and len(USUAL.findall(wide)) > 0.98 * len(wide):
                return codec, "UTF-16"
    if unicode or not sample:
        return None
    if stated:
        return stated, stated
    # some damaged bytes in UTF-8 are no other encoding
    foreign = sum(byte > 127 for byte in sample)
    if nuls or 2 * len(b"".join(MULTIBYTE.findall(sample))) > foreign:
        return None
    if len("".join(WESTERN.findall(decode("cp1252")))) >= 0.95 * foreign:
        return "cp1252", "Windows-1252"
    for codec, name, frequent, least in LEGACY:
        text = re.sub(r"[\0-\x7f]+", "", decode(codec))[:ENOUGH]
        usual, often = len(USUAL.findall(text)), sum(one in frequent for one in text)
        if len(text) >= 4 and usual >= 0.98 * len(text) and often >= least * len(text):
            return codec, name
    return None
