"""Links of notebooks to pages and to other notebooks, which MkDocs does not look at."""

import logging
import posixpath
import re

from mkdocs.utils import get_relative_url

log = logging.getLogger(f"mkdocs.hooks.{__name__}")

_LINK = re.compile(r'href="(?P<path>[^":#]+\.(?:md|ipynb))(?P<anchor>#[^"]*)?"')


def on_page_content(html, page, files, **_):
    """Makes them links to the pages of the site."""
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html

    def link(found):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["path"]))
        file = files.get_file_from_path(path)
        if file is None:
            log.warning("%s links to %s, which does not exist", source, found["path"])
            return found[0]
        return f'href="{get_relative_url(file.url, page.url)}{found["anchor"] or ""}"'

    return _LINK.sub(link, html)
