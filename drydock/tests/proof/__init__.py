"""The proof of Q8: a job that was accepted is never lost, and has its effect exactly once.

- `ledger.py`: the user's side. Accepts jobs over HTTP, keeps what was accepted in a file, and later asks the platform
  what became of it. It needs Python alone and works against any platform: `python -m proof.ledger --help`.
- `faults.py`, `harness.py`: real servers on this machine, faults on purpose, and the report: `python -m proof`.
- `settings.py` and what it names: the platform's own settings and one more app, whose jobs do nothing but leave an
  effect that can be counted.
- `unfenced.py`, `management/commands/broken_relay.py`: the product with one of its safeguards taken out, to see that
  the proof notices.
- `bench.py`: how fast the engine is, beside plain Celery.
"""
