"""Accounts that a command makes what they should be."""

import os

from django.core.management.base import CommandError
from django.db import transaction

from drydock.accounts.models import User


def user(username: str, password_env: str, staff: bool) -> str:
    """Create the account or correct it; `changed …` or `unchanged …`.

    password_env: environment variable that holds the password; CommandError when it is not set. staff: the account may
    see everybody's work.
    """
    password = os.environ.get(password_env, "")
    if not password:
        raise CommandError(
            f"{password_env} is not set: it holds the password of {username}. Set it in the environment."
        )
    with transaction.atomic(using="core"):
        account, created = User.objects.select_for_update().get_or_create(username=username)
        changes = ["created"] if created else []
        if not account.check_password(password):
            account.set_password(password)
            changes.append("password")
        if account.is_staff != staff:
            account.is_staff = staff
            changes.append("staff")
        if not account.is_active:
            account.is_active = True
            changes.append("active")
        if changes:
            account.save()
    return f"changed {username}: {', '.join(changes)}" if changes else f"unchanged {username}"
