"""The demo's course: small units about LaTeX and work in a lab."""

from dataclasses import dataclass
from uuid import uuid4

from django.db import transaction

from drydock.learning import availability
from drydock.learning.models import Unit


@dataclass(frozen=True)
class Content:
    """One unit as it should be; it may require only units that come before it, so that no circle can be made."""

    slug: str
    title: str
    body: str
    question: str
    answers: tuple[str, ...]
    requires: tuple[str, ...] = ()
    needs_photo: bool = False


COURSE = (
    Content(
        slug="first-document",
        title="A first LaTeX document",
        body="""\
A LaTeX source says what a text is, and the program decides how it looks. The smallest document has a class and a body:

    \\documentclass{article}
    \\begin{document}
    Hello, lab!
    \\end{document}

- `\\documentclass` names the kind of document: `article`, `report`, `book`.
- What stands before `\\begin{document}` is the preamble: packages and settings.

Write it under Documents, and read the PDF that comes back.""",
        question="Which command names the kind of document?",
        answers=("\\documentclass", "documentclass"),
    ),
    Content(
        slug="formulas",
        title="Formulas",
        body="""\
Mathematics stands between `\\(` and `\\)` within a line, and between `\\[` and `\\]` on a line of its own.

    \\[ \\bar{x} = \\frac{1}{n} \\sum_{i=1}^{n} x_i \\]

- `_` sets an index, `^` an exponent; braces hold more than one character together.
- `\\frac{a}{b}` is a fraction, `\\sqrt{x}` a root.""",
        question="Which command sets a fraction?",
        answers=("\\frac", "frac", "\\frac{a}{b}"),
        requires=("first-document",),
    ),
    Content(
        slug="lab-notebook",
        title="The lab notebook",
        body="""\
A notebook is kept so that somebody else can repeat the experiment, perhaps you in a year.

- Write with a pen, while you work, and date every page.
- Strike out what is wrong with one line: it must stay readable.
- Note every reading with its unit and its uncertainty.

Take a photo of one page of your notebook. A reviewer looks whether it is dated and readable.""",
        question="How many lines strike out a wrong entry?",
        answers=("1", "one", "one line"),
        needs_photo=True,
    ),
    Content(
        slug="tables",
        title="Tables of measurements",
        body="""\
A table of readings needs few lines: one above the heads, one below them, one at its end.

    \\begin{tabular}{lr}
    \\hline
    run & mass / g \\\\ \\hline
    1 & 12.31 \\\\
    2 & 12.28 \\\\ \\hline
    \\end{tabular}

- `&` ends a cell, `\\\\` a row.
- `l`, `c` and `r` say how a column is aligned.""",
        question="Which character ends a cell?",
        answers=("&", "ampersand"),
        requires=("first-document", "lab-notebook"),
    ),
    Content(
        slug="lab-report",
        title="The lab report",
        body="""\
The report puts it together: what was asked, what was done, what was read, and what follows.

- Question, method, readings, result: in this order.
- A result is a number, its uncertainty and its unit: `12.30 ± 0.02 g`.
- Every table and every figure is named in the text.""",
        question="A result is a number, its unit, and what else?",
        answers=("uncertainty", "its uncertainty", "the uncertainty"),
        requires=("formulas", "tables"),
    ),
)


def ensure(course: tuple[Content, ...]) -> list[str]:
    """Make the units what they should be; return the slugs of those that were not.

    What a unit asks for may have changed, so everybody's availability is computed again.
    """
    with transaction.atomic(using="core"):
        known = {unit.slug: unit for unit in Unit.objects.select_for_update()}
        changed = []
        for order, content in enumerate(course, start=1):
            unit = known.get(content.slug, Unit(slug=content.slug))
            required = {known[slug] for slug in content.requires}
            if _assign(unit, content, order) or set(unit.requires.all()) != required:
                unit.save()
                unit.requires.set(required)
                changed.append(unit.slug)
            known[unit.slug] = unit
        if changed:
            availability.ask_for(None, f"units:{uuid4()}")
    return changed


def _assign(unit: Unit, content: Content, order: int) -> bool:
    """Copy the content's fields; say whether the unit differed (or is new)."""
    values = {
        "title": content.title, "order": order, "body": content.body, "question": content.question,
        "answers": list(content.answers), "needs_photo": content.needs_photo,
    }  # fmt: skip
    differs = unit.pk is None or any(getattr(unit, name) != value for name, value in values.items())
    for name, value in values.items():
        setattr(unit, name, value)
    return differs
