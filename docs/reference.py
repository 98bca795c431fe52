"""For mkdocs: `::: vispco.name` in a page becomes the signature and docstring of that module, class or function.

Docstrings here are plain text, aligned by hand, so they are shown as they stand.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with the text of each page."""
    return re.sub(r"^::: (\S+)$", lambda found: "\n".join(entries(found[1])), markdown, flags=re.MULTILINE)


def entries(name: str) -> list[str]:
    """Markdown of what `name` names; of a module, of everything public that it defines (a package: that it lists)."""
    found = pkgutil.resolve_name(name)
    if not inspect.ismodule(found):
        return entry(name, found)
    listed = getattr(found, "__all__", None) or [k for k, v in vars(found).items() if getattr(v, "__module__", "") == name]
    lines = [f"### {name}", "", "```text", inspect.cleandoc(found.__doc__), "```", ""]
    for member in listed:
        value = getattr(found, member)
        if not member.startswith("_") and callable(value) and value.__doc__:
            lines += entry(f"{name}.{member}", value)
    return lines


def entry(name: str, value) -> list[str]:
    """Markdown of one class or function: heading, signature, docstring; of a class also its public methods' docstrings."""
    package, short = name.split(".")[0], name.rsplit(".", 1)[1]
    if getattr(importlib.import_module(package), short, None) is value:
        name = f"{package}.{short}"  # what users write
    lines = [f"### {name}", "", "```python", f"{short}{signature(value)}", "```", "", "```text", inspect.cleandoc(value.__doc__)]
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
            call = "" if isinstance(member, property) else signature(function)
            lines += ["", f".{key}{call}", textwrap.indent(inspect.cleandoc(function.__doc__), "    ")]
    return [*lines, "```", ""]


def signature(value) -> str:
    """As in the source, one parameter a line where it is long."""
    found, parts = inspect.signature(value), []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(str(parameter))
    end = str(found).rpartition(")")[2]
    one_line = f"({', '.join(parts)}){end}"
    text = one_line if len(one_line) < 90 else "(\n    " + ",\n    ".join(parts) + f"){end}"
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings, which is no news to a reader
