"""The API reference: each public name once, in the page of its folder, with links to it.

A line ``@names FOLDER`` of a page in api/ becomes the public names that `pyro_vae/FOLDER/`
holds, and for the classes that these names return. A page may also name further objects by their
full names. A name in single backticks of a docstring, and ``pv.NAME`` in a page, become links.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ForwardRef, get_args

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring, NumpyDocstring
from sphinx.transforms import SphinxTransform

import pyro_vae as pv

PUBLIC = {name: getattr(pv, name) for name in pv.__all__}


def _classes(hint: Any) -> Iterator[type]:
    """The classes of the package in a type hint."""
    if isinstance(hint, type) and hint.__module__.startswith("pyro_vae."):
        yield hint
    for part in get_args(hint):
        yield from _classes(part)


def _folder(value: Any) -> str:
    return value.__module__.split(".")[1]


def _read(hint: Any, module: str) -> Any:
    """A type hint; None if it is quoted and names what only type checkers import."""
    words = hint.__forward_arg__ if isinstance(hint, ForwardRef) else hint
    try:
        return eval(words, vars(sys.modules[module])) if isinstance(words, str) else words
    except NameError:
        return None


def _hints(value: Any) -> Iterator[Any]:
    """What a function returns; of a class its fields, its arguments, and what properties return."""
    own = inspect.get_annotations(value)
    if not inspect.isclass(value):
        yield own.get("return")
        return
    yield from own.values()
    for name, member in vars(value).items():
        if isinstance(member, property | cached_property):
            yield from _hints(member.fget if isinstance(member, property) else member.func)
        elif name == "__init__":
            yield from inspect.get_annotations(member).values()


def _returned(value: Any) -> list[type]:
    """The classes of the package in these hints."""
    return [kind for hint in _hints(value) for kind in _classes(_read(hint, value.__module__))]


def _results() -> dict[str, type]:
    """The classes of results, and of their fields, that are not public names themselves."""
    functions = [value for value in PUBLIC.values() if inspect.isfunction(value)]
    left = [kind for function in functions for kind in _returned(function)]
    found: dict[str, type] = {}
    while left:
        kind = left.pop()
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name not in found and kind not in PUBLIC.values():
            found[name] = kind
            left += _returned(kind)
    return found


RESULTS = _results()


def _directive(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:\n"
    return f".. autofunction:: {name}\n"


def _page_of(folder: str) -> str:
    """The directives of the names of a folder: functions, classes, then what functions return."""
    named = sorted(PUBLIC.items(), key=lambda item: inspect.isclass(item[1]))
    parts = [_directive(f"pyro_vae.{name}", v) for name, v in named if _folder(v) == folder]
    returned = [_directive(name, v) for name, v in sorted(RESULTS.items()) if _folder(v) == folder]
    if returned:
        parts += ["Results\n-------\n", *returned]
    return "\n".join(parts)


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    if page.startswith("api/"):
        source[0] = re.sub(r"(?m)^@names (\w+)$", lambda match: _page_of(match[1]), source[0])


def _outdated(app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
    """Read the reference anew each time: public names change without a change of its pages."""
    return [page for page in env.found_docs if page.startswith("api/")]


def _target(text: str) -> str | None:
    """The full name that the words of a docstring or a page name, if there is one."""
    name = re.sub(r"\(.*", "", text, flags=re.S)
    short = re.sub(r"^(pv|pyro_vae)\.", "", name)
    return f"pyro_vae.{short}" if short.split(".")[0] in PUBLIC else None


def _link(target: str, text: str, source: str) -> addnodes.pending_xref:
    literal = nodes.literal(text, text)
    return addnodes.pending_xref(
        source, literal, refdomain="py", reftype="obj", reftarget=target, refexplicit=True
    )


def _plain_stars(line: str) -> str:
    """The line with its stars escaped, such as that of ``(n, *data_shape)`` outside of literals."""
    parts = re.split(r"(``.*?``|`.*?`)", line)
    parts[::2] = [re.sub(r"(?<!\*)\*(?=\w+(?!\w*\*))", r"\\*", part) for part in parts[::2]]
    return "".join(parts)


def _linked(line: str) -> str:
    """The line with links in place of paths such as docs/how-to/engine.md."""
    return re.sub(r"\bdocs/([\w/-]+)\.md", r":doc:`/\1`", line)


def _in_our_form(line: str) -> str:
    """A line of a docstring; that of an example stays as it is."""
    return line if line.lstrip().startswith((">>>", "...")) else _linked(_plain_stars(line))


def _docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Our form of docstrings. Those of fields and properties are text, also with a colon."""
    plain = [_in_our_form(line) for line in lines]
    fields = what in ("attribute", "property", "data")
    if not fields:
        numpy_form = NumpyDocstring(plain, Config(), app, what, name).lines()  # that of settings
        plain = GoogleDocstring(numpy_form, Config(), app, what, name).lines()
    lines[:] = plain


def _backticks(
    role: str, raw: str, text: str, line: int, inliner: Inliner, *unused: Any, **more: Any
) -> tuple[list[nodes.Node], list[nodes.system_message]]:
    """The role of single backticks in docstrings."""
    target = text if text in RESULTS else _target(text)
    return [_link(target, text, raw) if target else nodes.literal(raw, text)], []


class LinkNames(SphinxTransform):
    """``pv.NAME`` and ``pv.NAME(...)`` in the text of a page lead to the reference."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            target = _target(literal.astext()) if literal.astext().startswith("pv.") else None
            if target and not isinstance(literal.parent, nodes.reference | nodes.title):
                literal.replace_self(_link(target, literal.astext(), literal.rawsource))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages' lines, the role and the links."""
    app.add_role("name", _backticks)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("source-read", _fill)
    app.connect("env-get-outdated", _outdated)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
