"""One HTML page from a template of `templates/`: one file, without references to anything outside of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, figures: Mapping[str, "Figure | None"], words: Mapping[str, Callable[..., str]] | None = None,
           **values: Any) -> str:  # fmt: skip
    """The page; figures become SVG under their names (empty where there is none), `words` are functions it may call."""
    import jinja2
    from markupsafe import Markup

    from analysis import plots

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= words or {}
    drawn = {name: Markup("" if one is None else plots.svg(one)) for name, one in figures.items()}  # noqa: S704, RUF100 - our own SVG
    return environment.get_template(template).render(**drawn, **values)
