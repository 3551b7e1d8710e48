"""Steady load on a platform of pairs while its hosts fail: what was promised, written down on the users' side, and what became of it."""
