"""An HTML page from one of the templates beside this file: a file that needs nothing beside it."""

from __future__ import annotations


def page(template: str, **content: object) -> str:
    """The page ``template``; what is in ``content`` is text, but for what it marks as safe."""
    import jinja2  # comes with torch

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imcl_fast.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(content)
