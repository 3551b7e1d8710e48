"""What commands that answer requests have in common: where."""

import argparse


def address_and_port(text: str) -> tuple[str, int]:
    """Read the value of `--listen`."""
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, as in 127.0.0.1:8001")
    return address, int(port)
