"""Template filters of units."""

from django import template
from django.utils.safestring import SafeString

from drydock.learning import markup

register = template.Library()


@register.filter
def as_html(text: str) -> SafeString:
    """Render a unit's body."""
    return markup.render(text)
