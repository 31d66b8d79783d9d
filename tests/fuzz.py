"""Damaged inputs at every door: none may end in a traceback, in nan, in a hang, half written, or with a wrong status.

python tests/fuzz.py --inputs 3000 --seed 0

Prints how many were answered, refused and skipped, by door; the exit status is 1 if any failed, and those inputs are
then kept in a folder, with what was printed. An input depends on the seed, its door and its number alone.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from fuzz_doors import ANSWERED, DOORS, REFUSED, SKIPPED, WHOLE

from timm_tresnet.utils.tables import format_markdown

FAILED = "FAILED"
_BOUND_S = 60  # an input takes a fraction of a second; machines can be busy
_STARTING_S = 300


def knock(door: str, count: int, seed: int, kept: Path) -> Counter[str]:
    """Try inputs at one door in processes that may crash or hang.

    Args:
        door: one of `DOORS`.
        count: how many inputs.
        seed: of the inputs.
        kept: folder for inputs that fail, which is made when there is one.

    Returns:
        How many got each verdict.
    """
    verdicts: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    number = 0
    while number < count:
        receiving, sending = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory() as folder:
            worker = context.Process(target=_work, args=(door, number, count, seed, kept, Path(folder), sending))
            worker.start()
            sending.close()
            try:
                ready = receiving.poll(_STARTING_S) and receiving.recv()
                while ready and number < count:
                    if not receiving.poll(_BOUND_S):
                        break
                    verdicts[receiving.recv()] += 1
                    number += 1
            except EOFError:
                ready = True
            if number < count:
                if not ready:
                    raise RuntimeError(f"{door} did not open")
                reason = "no answer" if worker.is_alive() else "crash"
                worker.kill()
                _keep(kept / f"{door} {number}", sorted(Path(folder).rglob("bad.*")), f"{reason}, seed {seed}")
                verdicts[FAILED] += 1
                number += 1
            worker.join()
    return verdicts


def _work(door: str, first: int, count: int, seed: int, kept: Path, folder: Path, sending: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    with open(folder / "stdout", "w+") as out, open(folder / "stderr", "w+") as err:
        for stream, descriptor in ((out, 1), (err, 2)):
            os.dup2(stream.fileno(), descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
        with warnings.catch_warnings():
            _warn_as_usual()
            made = DOORS[door][0](folder / "door")
            sending.send(True)
            for number in range(first, count):
                sending.send(_try_one(made, door, number, seed, kept, out, err))
    os._exit(0)


def _warn_as_usual() -> None:
    """As Python does for users, but each time."""
    warnings.resetwarnings()
    warnings.simplefilter("always")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def _try_one(made, door: str, number: int, seed: int, kept: Path, out, err) -> str:
    case = made.make(random.Random(f"{seed} {door} {number}"))
    for stream in (out, err):
        stream.seek(0)
        stream.truncate()
    status: object = None
    trace = ""
    try:
        status = case.run()
    except SystemExit as error:
        status = error.code
    except BaseException:
        trace = traceback.format_exc()
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    printed = [(Path(out.name)).read_text(errors="replace"), Path(err.name).read_text(errors="replace")]
    try:
        assert not trace, trace
        return case.judge(status, *printed)
    except (AssertionError, KeyError, LookupError, OSError, TypeError, ValueError) as error:
        report = {"status": str(status), "stdout": printed[0][-5000:], "stderr": printed[1][-5000:]}
        lines = [f"seed {seed}", case.note, f"{type(error).__name__}: {error}", json.dumps(report, indent=2)]
        _keep(kept / f"{door} {number}", case.kept, "\n".join(lines))
        return FAILED


def _keep(folder: Path, paths: Sequence[Path], report: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(report + "\n")
    for path in paths:
        shutil.copy(path, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments without the script's name; None for those of the process.

    Returns:
        Exit status: 0 if no input failed, else 1.
    """
    parser = argparse.ArgumentParser(description="Give damaged inputs to every door and count the verdicts.")
    parser.add_argument("--inputs", type=int, default=3000, help="of all doors together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door", choices=DOORS, help="this one alone")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-failures"), help="folder for inputs that fail")
    arguments = parser.parse_args(argv)
    verdicts = (ANSWERED, REFUSED, SKIPPED, WHOLE, FAILED)
    rows, failed = [], 0
    for door in [arguments.door] if arguments.door else DOORS:
        share = 1 if arguments.door else DOORS[door][1]
        counts = knock(door, max(round(arguments.inputs * share), 1), arguments.seed, arguments.kept)
        rows.append([door, counts.total(), *(counts[verdict] for verdict in verdicts)])
        failed += counts[FAILED]
    print(format_markdown(["door", "inputs", *verdicts], rows))
    if failed:
        print(f"{failed} inputs failed; they are in {arguments.kept}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
