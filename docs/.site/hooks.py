"""What turns docs/, the README and LOG.md into one site (MkDocs calls these functions, see
mkdocs.yml).

The README is the first page, LOG.md and its like are pages too. A file elsewhere in the repository
that a page links to is copied into the site, and the link changed, so that the pages read the same
here and on a code host.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
TOP = {"README.md": "index.md"} | {n: n for n in ("LOG.md", "CHANGELOG.md", "CONTRIBUTING.md")}
COPIED = "files"  # folder of the site for what is no page


def place(link, folder):
    """A link of a page in `folder` ("" or "docs") -> where it leads in the site, and the file to
    copy there or None.
    """
    path, mark, anchor = link.partition("#")
    if not path or "://" in path:
        return link, None
    target = (ROOT / folder / path).resolve().relative_to(ROOT)
    if str(target) in TOP:
        return TOP[str(target)] + mark + anchor, None
    if target.parts[0] == "docs":
        return str(PurePosixPath(*target.parts[1:])) + mark + anchor, None
    name = str(PurePosixPath(COPIED, *target.parts))
    if target.suffix not in (".png", ".jpg", ".webp", ".mp4"):
        name += ".txt"  # browsers show it
    return name, target


def rewritten(text, folder, copies):
    """Markdown with its links as `place` says; `copies` is filled by {name in the site: file}."""

    def replace(match):
        name, source = place(match[2], folder)
        if source is not None:
            copies[name] = source
        return match[1] + name + match[3]

    return LINK.sub(replace, text)


def on_files(files, config):
    """Add the top folder's pages, and what pages link to."""
    copies = {}
    for source, name in TOP.items():
        text = rewritten((ROOT / source).read_text(), "", copies)
        files.append(File.generated(config, name, content=text))
    for page in (ROOT / "docs").glob("*.md"):
        rewritten(page.read_text(), "docs", copies)
    for name, source in copies.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Change the links of the pages in docs/."""
    if page.file.src_uri in TOP.values():
        return markdown
    return rewritten(markdown, "docs", {})
