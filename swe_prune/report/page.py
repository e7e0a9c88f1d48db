"""Writes the page and its figures; each file appears whole or not at all."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from swe_prune.arguments import checked
from swe_prune.errors import visible
from swe_prune.report import markdown, read
from swe_prune.report.tables import Bold
from swe_prune.runtime import storage
from swe_prune.runtime.packages import require
from swe_prune.version import __version__

if TYPE_CHECKING:
    from swe_prune.report.look import Picture
    from swe_prune.report.sections import Group

_DPI = 180
_FIGURES = ("heat", "paths", "histograms", "training", "answers", "energy")
"""Groups of figures that are not losses."""


@checked
def build(workdir: epath.PathLike) -> list[epath.Path]:
    """Writes `workdir/report/report.html`, its figures as PNG and `tables.md`; returns the paths.

    The page is one file that needs neither network nor JavaScript. Partial results are shown, with
    a note of what is missing.

    Raises:
        InputError: No finished cell, a malformed file, or the extra `report` is not installed.
    """
    need_extra()
    # Imported here because they need matplotlib, which the rest of the library does without.
    from swe_prune.report import look, sections

    workdir = storage.parse_path(workdir, "working directory")
    results = read.load(workdir)
    with look.look():
        content = sections.content(results)
        groups: list[Group] = [*content["losses"], *(content[name] for name in _FIGURES)]
        pictures = [picture for group in groups for picture in group.pictures]
        for picture in pictures:  # once, not twice for each of the two files
            picture.figure.draw_without_rendering()
            picture.figure.set_layout_engine("none")
        svgs = {picture.name: _svg(picture) for picture in pictures}
        pngs = {f"{picture.name}.png": _png(picture) for picture in pictures}
    html = _html(content, svgs).encode()
    every = [*content["compared"], *content["language"], *content["tables"]]
    document = markdown.document(content["name"], content["headline"], every)
    tables = {"tables.md": document.encode()}
    files = {
        workdir / "report" / name: data
        for name, data in {"report.html": html, **pngs, **tables}.items()
    }
    for path, data in files.items():
        storage.write(path, data)
    return list(files)


def need_extra() -> None:
    """Raises InputError when the extra `report` is not installed."""
    for name in ("matplotlib", "jinja2"):
        require(name, "a report", "report")


def _svg(picture: "Picture") -> str:
    buffer = io.BytesIO()
    # Without a date and the like the same numbers give the same bytes.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    picture.figure.savefig(buffer, format="svg", metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(picture: "Picture") -> bytes:
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _html(content: dict[str, Any], svgs: dict[str, str]) -> str:
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("swe_prune.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_typographic,
    )
    environment.tests["bold"] = lambda text: isinstance(text, Bold)

    def size(picture: "Picture") -> tuple[int, int]:
        width, height = picture.figure.get_size_inches()
        return round(96 * width), round(96 * height)

    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(
        **content, svgs=svgs, size=size, css=markupsafe.Markup(css), version=__version__
    )


def _typographic(value: Any) -> Any:
    # Text is written with the keyboard's apostrophe; the page is set with the typographic one.
    if type(value) is not str:
        return value
    return visible(value, "\n").replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
