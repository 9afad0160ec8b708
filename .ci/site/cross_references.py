"""The names of the library become links to their entries in the reference, in docstrings and pages alike.

Writers put a name between backticks, as they do anyway: `adam`, `ao.adam` or `study.compare`, with or without
a call. The names of the study alone, which are common words, are links on the study's own pages only. A name
is no link within its own entry, or where it is the name of a parameter.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from public_names import MODULES, public_names

_TOKEN = re.compile(
    r'<h\d id="(?P<entry>adaptive_optax\.[\w.]+)".*?</h\d>'
    r"|<(?P<skipped>h\d|pre|a|autoref)\b.*?</(?P=skipped)>"
    r"|<code>(?P<name>[\w.]+)(?P<call>\(\))?</code>",
    re.DOTALL,
)
_PARAMETER = re.compile(r"<b><code>(\w+)</code></b>")

_targets: dict[str, str] = {}
_study_targets: dict[str, str] = {}


def on_pre_build(**_):
    """Collects what may be written for each public name."""
    for path in sorted(set().union(*map(public_names, MODULES)) - set(MODULES)):
        name = path.removeprefix("adaptive_optax.")
        _targets[path] = _targets[name] = _targets[f"ao.{name}"] = path
        if name.startswith("study."):
            _study_targets[name.rpartition(".")[2]] = path


def on_page_content(html, page, **_):
    """Links the names of a page."""
    known = _targets | (_study_targets if page.file.src_uri.startswith("reference/study") else {})
    starts = [found.start() for found in _TOKEN.finditer(html) if found["entry"]]
    bounds = [0, *starts, len(html)]
    return "".join(_linked(html[a:b], known) for a, b in zip(bounds, bounds[1:], strict=False))


def _linked(entry, known):
    """Links the names of one entry, which begins with its heading, or of the text before the first."""
    own, parameters = set(), set(_PARAMETER.findall(entry))

    def link(found):
        if found["entry"]:
            own.add(found["entry"])
        target = known.get(found["name"])
        if not target or target in own or found["name"] in parameters:
            return found[0]
        return f'<autoref identifier="{target}">{found[0]}</autoref>'

    return _TOKEN.sub(link, entry)
