"""Eight writers and two readers on a file and a folder, all killed at random, round after round.

    python tests/records/killed_writers.py --rounds 200

Each store has a table from its first outcome on. What a writer was told to be saved is there once,
whatever is killed; a line of the file that is cut short is one that nobody was told of.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from test_outcomes import RUN

from iimm_callbacks.records import store, table
from iimm_callbacks.records.catalog import Listed
from iimm_callbacks.records.store import append_outcome, check_store, open_store, read_outcomes

WRITERS, MOST = 8, 40  # of each round, outcomes of each writer
STEPS = [{"share": i / 100, "gain": 0.1} for i in range(100)]  # a line of some kB


def fork(work):
    """A process of its own, and the end of a pipe that has what it says."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        work(lambda text: os.write(write_end, f"{text}\n".encode()))
        os._exit(0)
    os.close(write_end)
    return child, read_end


def write(place, name, say):
    for i in range(MOST):
        append_outcome(place, replace(RUN, task=name, run=f"{name}-{i}", trajectory=STEPS))
        say(f"{name}-{i}")


def read(place, say):
    while True:
        open_store(place).relevant(RUN.model_fingerprint)


def one_round(places, number, rng, sure, longest):
    """Start all, kill all, and add to `sure` what the writers were sure of."""
    started = [
        (place, *fork(lambda say, p=place, n=f"{number}-{i}": write(p, n, say)))
        for i, place in enumerate(places * (WRITERS // len(places)))
    ]
    started += [(place, *fork(lambda say, p=place: read(p, say))) for place in places]
    for _, child, _ in rng.sample(started, len(started)):
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    for place, child, end in started:
        os.waitpid(child, 0)
        with os.fdopen(end) as said:
            sure[place] |= set(said.read().split())


def check(places, sure):
    """Nothing lost, nothing double, and the table says what the store holds; how many are torn."""
    torn = 0
    for place in places:
        found = read_outcomes(place)
        names = [o.run for o in found]
        assert len(names) == len(set(names)), "double"
        assert sure[place] <= set(names), "lost"
        assert all(o.trajectory == STEPS for o in found), "torn"
        tabled, whole = (
            known.relevant(RUN.model_fingerprint) for known in (open_store(place), Listed(found))
        )
        assert {o.run for o in tabled} == {o.run for o in whole}, "the table"
        assert open_store(place).n_outcomes == len(names)
        torn += len(check_store(place))
    return torn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    rng, begun = random.Random(0), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store._LARGE = store._MANY = 1
        table._folder = lambda: Path(folder) / "tables"
        places = [f"{folder}/file.jsonl", f"{folder}/team/"]
        sure = {place: set() for place in places}
        for number in range(rounds):
            one_round(places, number, rng, sure, 0.02)
            if number % 10 == 9 or number == rounds - 1:
                torn = check(places, sure)
                counts = ", ".join(str(len(names)) for names in sure.values())
                print(f"{number + 1} rounds: {counts} sure, all there once; {torn} cut short")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
