"""What the search shows first: pages that answer questions, then what is behind them, then the reference.

The search matches the beginnings of all words of a question, "is" and "how" too, which names in the reference
contain in plenty.
"""

_BOOSTS = {
    "guides/": 4,
    "migrating/": 4,
    "start.md": 4,
    "scale.md": 4,
    "own_script.md": 4,
    "on_my_model.md": 4,
    "should_i_decay.md": 2,
    "notebooks/": 0.5,
    "theory.md": 0.5,
    "design.md": 0.5,
    "error_control.md": 2,
    "extending.md": 2,
    "reference/": 0.3,
}


def on_page_markdown(markdown, page, **_):
    """Sets the boost of a page."""
    for path, boost in _BOOSTS.items():
        if page.file.src_uri.startswith(path):
            page.meta.setdefault("search", {})["boost"] = boost
    return markdown
