"""A report as one HTML file that asks nothing of any network and reads without a script.

Everything is escaped by the template engine but three things that are ours: the style sheet, the script, whose hashes
the page's content policy names, and drawings that `svg.clean_svg` has taken apart and put together again.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from edgecomp import __version__
from edgecomp.errors import MissingDependency
from edgecomp.report.page.colours import DARK, LIGHT, scheme_css
from edgecomp.report.page.draw import open_pen, require_matplotlib
from edgecomp.report.page.svg import clean_svg
from edgecomp.report.page.values import Page, Picture, Section

__all__ = ["render_html", "require_html"]

_TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def require_html() -> None:
    """Refuse early where a package is missing.

    Raises:
        MissingDependency: naming the extra that brings it.
    """
    require_matplotlib("an HTML report")
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependency("jinja2", needed_for="an HTML report", extra="report") from error


def render_html(page: Page) -> str:
    """Return the page.

    Raises:
        MissingDependency: jinja2 or matplotlib is missing.
    """
    require_html()
    import jinja2
    from markupsafe import Markup

    with open_pen("an HTML report") as pen:
        drawings = {
            plot.slug: Markup(clean_svg(pen.svg(plot), name=plot.slug, title=plot.title, alt=plot.alt))  # noqa: S704
            for plot in page.plots
        }
    for picture in _pictures(page.sections):
        drawings[picture.slug] = Markup(picture.svg)  # noqa: S704 - drawn by edgecomp itself
    style, script = _style(), _template("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    engine.filters["coded"] = _coded
    return engine.get_template("page.html").render(
        page=page,
        drawings=drawings,
        policy=policy,
        style=Markup(style),  # noqa: S704 - our own file
        script=Markup(script),  # noqa: S704
        version=__version__,
    )


def _coded(line: str) -> str:
    """Return a line, escaped, in which what stands between backticks is set as code."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in line.split("`")]
    if len(parts) % 2 == 0:  # one backtick has no other
        return escape(line)
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts))


def _pictures(sections: tuple[Section, ...]) -> list[Picture]:
    return [picture for section in sections for picture in (*section.pictures, *_pictures(section.parts))]


@functools.cache
def _template(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _style() -> str:
    """Return the style sheet: the colours of both schemes, light on paper, then the rules."""
    light, dark = (";".join(f"--{name}:{colour}" for name, colour in of.items()) for of in (LIGHT, DARK))
    schemes = f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return f"{schemes}{scheme_css()}\n{_template('page.css')}"


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
