"""Random faults under steady load for a while, or each fault once; the result in $EVENKEEL_STATE/failover."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .faults import FAULTS, Fault
from .places import ROOT, NotInTimeError, Platform
from .run import Run, Window, keep

#: A soak has two faults, one after the other, in each stretch of so many seconds.
STRETCH_SECONDS, FAULTS_IN_STRETCH = 120, 2


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def told(window: Window) -> str:
    """One fault in one line."""
    writes = ", ".join(f"{name} {seconds:.1f}" for name, seconds in window.interruption_seconds.items())
    return (
        f"{window.title} ({window.hit}): writes stood still {writes} s; {window.http['failed']} of {window.http['requests']} requests "
        f"failed {window.http['failures'] or ''}, slowest {window.http['slowest_seconds']:.1f} s; {window.commits['lost']} commits lost; "
        f"whole {window.whole_after_seconds:.0f} s after"
    )


def soak(run: Run, faults: Sequence[Fault], minutes: float, seed: int) -> None:
    """Let random faults happen at random moments."""
    chance = random.Random(seed)
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        stretch = time.monotonic()
        for _ in range(FAULTS_IN_STRETCH):
            if time.monotonic() < end:
                time.sleep(chance.uniform(0, 15))
                one(run, chance.choice(faults))
        time.sleep(max(0.0, min(stretch + STRETCH_SECONDS, end) - time.monotonic()))


def one(run: Run, fault: Fault) -> None:
    say(f"now: {fault.title}")
    say(told(run.inflict(fault)))


def main() -> int:
    """Run; 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="bin/soak", description=__doc__)
    parser.add_argument("--inventory", type=Path, default=ROOT / "inventories/lab", help="whose hosts (default: inventories/lab)")
    parser.add_argument("--minutes", type=float, default=10, help="for how long random faults happen (default: 10)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="decides which faults, and when")
    parser.add_argument("--each", action="store_true", help="instead: each fault once, one after another")
    parser.add_argument("--times", type=int, default=1, help="with --each: how often (default: 1)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only faults whose title has these words in it")
    chosen = parser.parse_args()
    if chosen.times < 1 or (chosen.times > 1 and not chosen.each):
        parser.error("--times is how often --each makes each fault: type for example --each --times 3")
    faults = [fault for fault in FAULTS if chosen.only in fault.title]
    if not faults:
        parser.error(f"no fault has {chosen.only!r} in its title; there are: {'; '.join(fault.title for fault in FAULTS)}")
    say(f"each fault, {chosen.times} times" if chosen.each else f"random faults for {chosen.minutes:g} minutes, seed {chosen.seed}")
    run = Run(Platform.of(chosen.inventory.resolve()))
    failed = ""
    try:
        run.start()
        try:
            if chosen.each:
                for fault in faults * chosen.times:
                    one(run, fault)
            else:
                soak(run, faults, chosen.minutes, chosen.seed)
        except (NotInTimeError, OSError) as error:
            failed = str(error)
        say("looking what became of everything that was accepted")
        run.stop()
        say(f"result: {keep(run.result() | ({} if chosen.each else {'seed': chosen.seed}))}")
    finally:
        run.close()
    broken = [*run.broken(), *([failed] if failed else [])]
    for promise in broken:
        say(f"BROKEN: {promise}")
    if not broken:
        say("nothing that was acknowledged or accepted is lost or there twice")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
