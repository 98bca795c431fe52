"""For mkdocs: `::: vispco.name` in a page becomes the signature and docstring of what it names.

That is a module, a class or a function. Docstrings here are plain text, aligned by hand, so they
are shown as they stand.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import textwrap


def on_page_markdown(markdown: str, **_) -> str:
    """mkdocs calls this with the text of each page."""

    def replacement(found: re.Match) -> str:
        return "\n".join(entries(found[1]))

    # One word alone names the language of a block of code. The second is for docs/run.py.
    markdown = markdown.replace("```output varies\n", "```output\n")
    return re.sub(r"^::: (\S+)$", replacement, markdown, flags=re.MULTILINE)


def entries(name: str) -> list[str]:
    """Markdown of what `name` names.

    Of a module: of everything public that it defines. Of a package: of everything that it lists.
    """
    found = pkgutil.resolve_name(name)
    if not inspect.ismodule(found):
        return entry(name, found)
    own = [key for key, value in vars(found).items() if getattr(value, "__module__", "") == name]
    listed = getattr(found, "__all__", None) or own
    lines = [f"### {name}", "", "```text", inspect.cleandoc(found.__doc__), "```", ""]
    for member in listed:
        value = getattr(found, member)
        if not member.startswith("_") and callable(value) and value.__doc__:
            lines += entry(f"{name}.{member}", value)
    return lines


def entry(name: str, value) -> list[str]:
    """Markdown of one class or function: heading, signature, docstring.

    Of a class also the docstrings of its public methods.
    """
    package, short = name.split(".")[0], name.rsplit(".", 1)[1]
    # A name that the package has is the one that users write.
    if getattr(importlib.import_module(package), short, None) is value:
        name = f"{package}.{short}"
    lines = [f"### {name}", "", "```python", f"{short}{signature(value)}", "```", ""]
    lines += ["```text", inspect.cleandoc(value.__doc__)]
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        if isinstance(member, property):
            function = member.fget
        else:
            function = getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
            call = "" if isinstance(member, property) else signature(function)
            docstring = textwrap.indent(inspect.cleandoc(function.__doc__), "    ")
            lines += ["", f".{key}{call}", docstring]
    return [*lines, "```", ""]


def signature(value) -> str:
    """As in the source, one parameter a line where it is long."""
    found, parts = inspect.signature(value), []
    for parameter in found.parameters.values():
        starred = any(part.startswith("*") for part in parts)
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        parts.append(str(parameter))
    end = str(found).rpartition(")")[2]
    one_line = f"({', '.join(parts)}){end}"
    text = one_line if len(one_line) < 90 else "(\n    " + ",\n    ".join(parts) + f"){end}"
    # Annotations are strings. A reader need not see the quotes.
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
