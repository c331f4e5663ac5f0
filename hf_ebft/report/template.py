"""Renders pages with jinja2, in one style.

`base.html.jinja` is the frame of a page, `shared.html.jinja` contains the parts that pages share.
jinja2 escapes every text that comes from a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_ebft.version import __version__
from hf_ebft.watching.charts import css_variables
from hf_ebft.watching.curves import format_number
from hf_ebft.watching.tensorboard import visible

_HERE = Path(__file__).parent


def render(name: str, *, folder: Path = _HERE, title: str, **values: Any) -> str:
    """Render a page from its template.

    Args:
        name: name of the template.
        folder: folder of the template; templates of this folder can be extended and imported, too.
        title: title of the page.
        **values: further values for the template.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"visible": visible, "number": format_number}
    return environment.get_template(name).render(
        title=title,
        light=css_variables(dark=False),
        dark=css_variables(dark=True),
        version=__version__,
        **values,
    )
