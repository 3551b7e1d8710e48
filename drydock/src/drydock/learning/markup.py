"""The little markup of a unit's body: paragraphs, lists, code. Everything else is text."""

import re

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

CODE = re.compile(r"`([^`\n]+)`")


def render(text: str) -> SafeString:
    """Return the text as HTML.

    Blocks are separated by empty lines. One whose lines all begin with "- " is a list; one whose lines all begin with
    four spaces is shown as it is; any other is a paragraph. `Backticks` make code in paragraphs and lists.
    """
    blocks = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))
    return format_html_join("\n", "{}", ((_block(block.strip("\n").split("\n")),) for block in blocks if block.strip()))


def _block(lines: list[str]) -> SafeString:
    if all(line.startswith("    ") for line in lines):
        return format_html("<pre>{}</pre>", "\n".join(line[4:] for line in lines))
    if all(line.startswith("- ") for line in lines):
        items = format_html_join("", "<li>{}</li>", ((_inline(line[2:]),) for line in lines))
        return format_html("<ul>{}</ul>", items)
    return format_html("<p>{}</p>", _inline("\n".join(lines)))


def _inline(text: str) -> SafeString:
    # Every second part is what the backticks hold.
    parts = enumerate(CODE.split(text))
    return format_html_join("", "{}", ((format_html("<code>{}</code>", p) if n % 2 else p,) for n, p in parts))
