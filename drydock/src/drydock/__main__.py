"""`python -m drydock` is the `drydock` command."""

from drydock.cli import main

main()
