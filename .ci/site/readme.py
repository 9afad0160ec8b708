"""The README is the home page, so that nothing is written twice; links out of `docs/` lead to the repository.

GitHub resolves a page's links from its file. Here those to files under `docs/` become relative to the page,
so that MkDocs checks them, and those to other files of the repository become links to GitHub. Pictures in a
light and a dark version follow the switch of the site.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

log = logging.getLogger(f"mkdocs.hooks.{__name__}")

ROOT = Path(__file__).parents[2]
_HOME = "index.md"
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?=[#)])")
_PICTURE = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'<img alt="(?P<alt>[^"]+)" src="(?P<light>[^"]+)"></picture>'
)


def on_files(files, config):
    """Adds the README as the home page."""
    files.append(File.generated(config, _HOME, abs_src_path=str(ROOT / "README.md")))
    return files


def on_page_markdown(markdown, page, config, **_):
    """Rewrites the links of a page, which are relative to its file in the repository."""
    uri = page.file.src_uri
    source = "README.md" if uri == _HOME else f"docs/{uri}"

    def link(found):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", source, found["path"])
        if path.startswith("docs/"):
            return posixpath.relpath(path, posixpath.dirname(f"docs/{uri}"))
        return f"{config.repo_url}/blob/main/{path}"

    def prose(text):
        return _LINK.sub(
            link, _PICTURE.sub(r"![\g<alt>](\g<light>#only-light)![\g<alt>](\g<dark>#only-dark)", text)
        )

    parts = _CODE.split(markdown)
    parts[::2] = map(prose, parts[::2])
    return "".join(parts)
