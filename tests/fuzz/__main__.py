"""Bad input at random: `make fuzz SECONDS=60 ENGINE=torch SEED=0`. Exits with 1 if it finds any."""

import argparse
import secrets
import sys
from collections.abc import Sequence

from tests.fuzz.cases import Found, run_case
from tests.fuzz.runner import ENGINES, each_alone, findings, load, run, seeds, table


def tell(found: Found) -> None:
    print(found, flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, help="default: another one each time")
    parser.add_argument("--each", action="store_true", help="each fault alone with each verb")
    parser.add_argument("--case", action="append", help="run one case again; says all of it")
    given = parser.parse_args(arguments)
    engine = load(given.engine)
    if given.case:
        found = [run_case(engine, case) for case in given.case]
        print(*found, sep="\n")
        return int(bool(findings(found)))
    if given.each:
        cases = each_alone(engine)
    else:
        seed = secrets.randbelow(10**6) if given.seed is None else given.seed
        print(f"seed {seed}", flush=True)
        cases = seeds(seed, given.cases)
    found = run(engine, cases, given.seconds, tell)
    print(table(given.engine, found))
    return int(bool(findings(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
