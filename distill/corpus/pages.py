"""The text of pages: HTML as a browser shows it, PDF page by page, Word with its tables."""

import zipfile
from pathlib import Path

MAX_UNPACKED = 2**28  # bytes that a .docx may hold
SHORT_PAGE = 200  # characters below which a page of a PDF is read together with the next
BLOCKS = frozenset(
    "address article aside blockquote br dd div dl dt figcaption footer h1 h2 h3 h4 h5 h6 header "
    "hr li listing main ol p plaintext pre section table td th tr ul xmp".split()
)
HIDDEN = frozenset("script style template noscript title nav iframe noembed noframes".split())
VERBATIM = frozenset("pre listing plaintext textarea xmp".split())


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


def html_to_text(html: str) -> str:
    """Return the visible text of a page: a block ends a line, `pre` keeps its spaces.

    Nothing is fetched, and no entity but HTML's own is expanded. Raises ValueError where it is
    nested too deeply, or holds a NUL character, which the parser would replace.
    """
    from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

    if "\0" in html:
        raise ValueError("holds a NUL character")
    parser = etree.HTMLParser(
        encoding="utf-8", no_network=True, huge_tree=True, remove_comments=True, remove_pis=True
    )
    tree = etree.HTML(html.encode("utf-8", "replace"), parser) if html.strip() else None
    if any("Excessive depth" in error.message for error in parser.error_log):
        raise ValueError("too many HTML elements inside one another")
    parts, hidden, verbatim = list[str](), 0, 0
    for event, element in etree.iterwalk(tree, ("start", "end")) if tree is not None else ():
        tag, step = element.tag, 1 if event == "start" else -1
        if tag in BLOCKS and not (step < 0 and tag in ("br", "hr")):
            parts.append("\n\n" if tag[0] in "ph" else "\n")
        hidden += step * (tag in HIDDEN)
        verbatim += step * (tag in VERBATIM)
        text = (element.text if step > 0 else element.tail) or ""
        if text and not verbatim:
            # collapsed as a browser does, with one space at each end that had any
            middle = " ".join(text.split())
            text = f"{' ' * text[0].isspace()}{middle}{' ' * text[-1].isspace()}" if middle else " "
        parts.append("" if hidden else text)
    return "".join(parts)
