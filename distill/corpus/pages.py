"""The text of pages: HTML as a browser shows it, PDF page by page, Word with its tables."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

MAX_UNPACKED = 2**28  # bytes that a .docx may hold
SHORT_PAGE = 200  # characters below which a page of a PDF is read together with the next
BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figcaption footer h1 h2 h3 h4 h5 h6 header "
    "hr li listing main ol p plaintext pre section table td th tr ul xmp".split()
)
HIDDEN = frozenset("script style template noscript title nav iframe noembed noframes".split())
VERBATIM = frozenset("pre listing plaintext textarea xmp".split())
BLOCK_END = re.compile(rf"</({'|'.join(sorted(BLOCKS))})\s*>", re.IGNORECASE)
MARK = "<br end={}>"  # after each of these, which the parser tells only where it closes something
MARKS = re.compile(MARK.format(r"\w+"))  # left where markup is text, as in a textarea
# libxml2 looks through all open elements for what an end tag closes: these take some five seconds
MAX_LOOKS = 2_000_000_000


def pdf_pages(path: Path) -> list[dict[str, object]]:
    """Return the text of each page; a short one goes with its neighbour."""
    import pypdf

    reader, pages = pypdf.PdfReader(path), list[tuple[int, str]]()
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it needs a password")
    for number, page in enumerate(reader.pages, 1):
        text = page.extract_text().strip()
        if pages and min(len(text), len(pages[-1][1])) < SHORT_PAGE:
            number, before = pages.pop()
            text = f"{before}\n\n{text}".strip()
        pages += [(number, text)] if text else []
    return [{"text": text, "page": number} for number, text in pages]


def docx_text(path: Path) -> list[dict[str, object]]:
    """Return the paragraphs and tables in their order, as one text."""
    import docx

    with zipfile.ZipFile(path) as packed:
        if sum(member.file_size for member in packed.infolist()) > MAX_UNPACKED:
            raise ValueError(f"larger than {MAX_UNPACKED:,} bytes when unpacked")
    blocks = list[str]()
    for block in docx.Document(str(path)).iter_inner_content():
        if (rows := getattr(block, "rows", None)) is None:
            blocks.append(getattr(block, "text", ""))
            continue
        # a cell that spans columns is listed once for each
        cells = [{cell._tc: cell.text for cell in row.cells} for row in rows]
        blocks.append("\n".join("\t".join(texts.values()) for texts in cells))
    return [{"text": "\n\n".join(filter(None, blocks))}]


class _PageText:
    """Collects the visible text as the parser meets it; a block ends a line, `pre` keeps spaces.

    No tree is built, so neither depth nor size is a matter of the stack or of memory.
    """

    def __init__(self, max_depth: int) -> None:
        self.parts: list[str] = []
        self.run: list[str] = []  # pieces of text without a tag between them
        self.depth = self.hidden = self.verbatim = 0
        self.max_depth = max_depth
        self.ended = False  # whether a block has ended since the last line did

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self._end_run()
        self.depth += 1
        if self.depth > self.max_depth:
            raise ValueError(f"more than {self.max_depth:,} HTML elements inside one another")
        self.hidden += tag in HIDDEN
        self.verbatim += tag in VERBATIM
        if tag in BLOCKS:
            block = attributes.get("end", tag)
            self.parts.append("\n\n" if block[:1] in ("p", "h") else "\n")
            self.ended = False

    def end(self, tag: str) -> None:
        self._end_run()
        self.depth -= 1
        self.hidden -= tag in HIDDEN
        self.verbatim -= tag in VERBATIM
        self.ended |= tag in BLOCKS and tag not in ("br", "hr")

    def data(self, data: str) -> None:
        if not self.hidden:
            self.run.append(data)

    def _end_run(self) -> None:
        text, self.run = "".join(self.run), []
        if not text:
            return
        if not self.verbatim:
            # collapsed as a browser does, with one space at each end that had any
            middle = " ".join(text.split())
            text = f"{' ' * text[0].isspace()}{middle}{' ' * text[-1].isspace()}" if middle else " "
        if self.ended and text != " ":  # a block ended without an end tag
            self.parts.append("\n")
            self.ended = False
        self.parts.append(text)

    def close(self) -> str:
        self._end_run()
        return "".join(self.parts)


def html_to_text(html: str) -> str:
    """Return the visible text of a page, one block a paragraph.

    Whatever the page declares, nothing is fetched and no entity but HTML's own is expanded. Raises
    ValueError where it is nested too deeply.
    """
    from lxml.html import HTMLParser  # few corpora are pages

    if not html.strip():
        return ""
    collector = _PageText(MAX_LOOKS // (1 + html.count("</")))
    parser = HTMLParser(target=collector, encoding="utf-8", no_network=True, huge_tree=True)
    marked = BLOCK_END.sub(lambda end: end[0] + MARK.format(end[1].lower()), html)
    data = marked.encode("utf-8", "replace")
    # in pieces: an error of the collector stops the parser at the end of a piece
    for start in range(0, len(data), 2**16):
        parser.feed(data[start : start + 2**16])
    return MARKS.sub("", parser.close())
