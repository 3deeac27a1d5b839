"""`edgecomp report`: results as a page, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgecomp.api._progress import Progress, silent
from edgecomp.errors import InvalidSpec
from edgecomp.report.page.compose import compose_page
from edgecomp.report.page.draw import MARKER, open_pen, require_matplotlib
from edgecomp.report.page.html import render_html, require_html
from edgecomp.report.page.plain import CSV_MARKER, MARKDOWN_MARKER, render_csv, render_markdown
from edgecomp.report.page.sources import read_sources
from edgecomp.report.page.svg import clean_svg, standalone_svg
from edgecomp.report.page.values import Page, Picture
from edgecomp.report.page.words import shown
from edgecomp.report.page.write import require_free, write_report
from edgecomp.report.report import ReportOutcome

if TYPE_CHECKING:
    from edgecomp.patches import Picture as Drawn

__all__ = ["report"]


def report(
    results: Sequence[str | Path],
    *,
    html: str | Path = "",
    markdown: str | Path = "",
    csv: str | Path = "",
    plot: str | Path = "",
    bundle: str | Path = "",
    image: str | Path = "",
    force: bool = False,
    progress: Progress = silent,
) -> ReportOutcome:
    """Make a report of results; nothing is measured, and no clock is read: the same results give the same bytes.

    Args:
        results: files that `profile --out`, or `evaluate` and `calibrate` with `--json`, wrote; or folders of them.
        html: write one page here that needs no network.
        markdown: write the tables here.
        csv: write a row for each measured graph here.
        plot: write each plot into this folder, as SVG and PNG.
        bundle: draw what became of the patches of `image` in this bundle, layer by layer, as `run --draw` does.
        image: "": the photograph that ships with edgecomp.
        force: overwrite files that are no reports.
        progress: takes one line for each plot.

    Raises:
        RunError: a file is no result, is truncated or of a newer schema; its name is said, and nothing is written.
        MissingDependency: `html` and `plot` need matplotlib, `html` needs jinja2.
        InvalidSpec: a file to write is there and is something else.
    """
    wanted = {"--html": (html, MARKER), "--markdown": (markdown, MARKDOWN_MARKER), "--csv": (csv, CSV_MARKER)}
    files = {option: (Path(file), marker) for option, (file, marker) in wanted.items() if str(file)}
    _require_apart({option: file for option, (file, _) in files.items()})
    for file, marker in files.values():
        require_free(file, marker, force=force)
    if str(plot) and Path(plot).exists() and not Path(plot).is_dir():
        raise InvalidSpec(f"--plot {plot} is a file; name a folder")
    if str(image) and not str(bundle):
        raise InvalidSpec(f"--image {image} is drawn on in a bundle; name one with --bundle")
    if str(html):
        require_html()
    if str(plot):
        require_matplotlib("--plot")
    sources = read_sources([Path(result) for result in results])
    picture = _drawn_patches(bundle, image, progress=progress) if str(bundle) else None
    page = compose_page(sources, pictures=_shown(picture) if picture is not None else ())
    if str(plot):
        _require_free_plots(page, Path(plot), force=force)
    written: list[str] = []
    if str(html):
        progress("drawing the page")
        written.append(str(write_report(Path(html), render_html(page))))
    if str(markdown):
        written.append(str(write_report(Path(markdown), render_markdown(page))))
    if str(csv):
        written.append(str(write_report(Path(csv), render_csv(sources.files))))
    if str(plot):
        with open_pen("--plot") as pen:
            for one in page.plots:
                progress(f"drawing {one.slug}")
                clean = clean_svg(pen.svg(one), name=one.slug, title=one.title, alt=one.alt)
                written.append(str(write_report(Path(plot) / f"{one.slug}.svg", standalone_svg(clean))))
                written.append(str(write_report(Path(plot) / f"{one.slug}.png", pen.png(one))))
        if picture is not None:
            written += _write_picture(picture, Path(plot), force=force)
    return ReportOutcome(tuple(source.name for source in sources.files), sources.left_out, page, tuple(written))


def _drawn_patches(bundle: str | Path, image: str | Path, *, progress: Progress) -> Drawn:
    from edgecomp.api._draw import draw

    progress(f"drawing the patches of {image or 'the photograph'}")
    return draw(bundle, image, progress=progress)


def _shown(picture: Drawn) -> tuple[Picture, ...]:
    """Return the picture as a page has it."""
    from edgecomp.report.patch_shapes import describe_layer, headline
    from edgecomp.report.pictures import picture_svg

    title = f"{shown(picture.patches.method)} on {shown(picture.image)}: {shown(picture.bundle)}"
    notes = [f"{shown(note, longest=300)}." for note in picture.patches.notes]
    layers = [describe_layer(layer, picture.patches) for layer in picture.patches.layers]
    said = " ".join([f"{headline(picture.patches)}.", *layers, *notes])
    return (Picture("patch-picture", title, shown(said, longest=4000), picture_svg(picture, ident="pp", in_page=True)),)


def _write_picture(picture: Drawn, folder: Path, *, force: bool) -> list[str]:
    from edgecomp.report.pictures import picture_png, picture_svg

    files = {folder / "patches.svg": picture_svg(picture).encode(), folder / "patches.png": picture_png(picture)}
    for file, content in files.items():
        if file.exists() and file.read_bytes() != content and not force:
            raise InvalidSpec(f"{file} is there and is another picture; name another folder, or --force to lose it")
    return [str(write_report(file, content)) for file, content in files.items()]


def _require_apart(files: dict[str, Path]) -> None:
    """Refuse two options that name one file."""
    seen: dict[Path, str] = {}
    for option, file in files.items():
        other = seen.setdefault(file.resolve(), option)
        if other != option:
            raise InvalidSpec(f"{other} and {option} both name {file}; name two files")


def _require_free_plots(page: Page, folder: Path, *, force: bool) -> None:
    for one in page.plots:
        for ending in ("svg", "png"):
            require_free(folder / f"{one.slug}.{ending}", MARKER, force=force)
