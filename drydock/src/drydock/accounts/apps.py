"""People."""

from django.apps import AppConfig


class AccountsConfig(AppConfig):
    """Accounts, signing in and out."""

    name = "drydock.accounts"
