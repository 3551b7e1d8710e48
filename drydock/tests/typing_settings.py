"""The settings with example values, for the type checker: it needs the models, not a platform."""

import os

from drydock.config import VARIABLES

SECRET = "0123456789abcdefghijklmnopqrstuvwxyz-0123456789-types"
UNSET = {name: variable.example for name, variable in VARIABLES.items() if variable.default is None}
os.environ.update(UNSET | {"DRYDOCK_SECRET_KEY": SECRET})

from drydock.settings import *  # noqa: E402, F403
