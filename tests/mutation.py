"""Breaks the package in small ways, one at a time, and counts how many of these mutants the tests notice.

    python tests/mutation.py --mutants 300 --seed 0

Draws mutants of the files that pyproject.toml names under tool.mutmut, has mutmut run for each the tests that call the
function it is in, and prints how many were killed, by file, and the names of those that were not. `mutmut show NAME`
prints a mutant. The mutated copy of the package stays in mutants/, with what was found; delete it to begin anew.
"""

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name

from timm_tresnet.utils.tables import format_markdown

_KILLED = ("killed", "timeout", "segfault")


def draw_mutants(count: int, seed: int) -> dict[str, Path]:
    """Names of mutants, with the files that they are in."""
    files = {
        get_mutant_name(path, name): path
        for path in sorted(walk_mutatable_files())
        for name in mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names
    }
    drawn = random.Random(seed).sample(list(files), min(count, len(files)))
    return {name: files[name] for name in drawn}


def read_verdicts(drawn: dict[str, Path]) -> dict[str, str]:
    """What mutmut noted down of each."""
    verdicts = {}
    for path in sorted(set(drawn.values())):
        codes = json.loads(Path("mutants", f"{path}.meta").read_text())["exit_code_by_key"]
        verdicts |= {name: status_by_exit_code[codes[name]] for name in drawn if drawn[name] == path}
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments without the script's name; None for those of the process.

    Returns:
        Exit status: 0 if all mutants were tried, else mutmut's.
    """
    parser = argparse.ArgumentParser(description="Count the mutants of the package that the tests notice.")
    parser.add_argument("--mutants", type=int, default=300, help="how many to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    drawn = draw_mutants(arguments.mutants, arguments.seed)
    command = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", str(arguments.processes), *drawn]
    status = subprocess.run(command, check=False).returncode
    if status:
        return status
    verdicts = read_verdicts(drawn)
    rows = []
    for path in sorted(set(drawn.values())):
        counts = Counter(verdicts[name] in _KILLED for name in drawn if drawn[name] == path)
        rows.append([str(path), counts.total(), counts[True], counts[False]])
    rows.append(["all", *(sum(row[column] for row in rows) for column in (1, 2, 3))])
    print(format_markdown(["file", "mutants", "killed", "alive"], rows))
    for name, verdict in sorted(verdicts.items()):
        if verdict not in _KILLED:
            print(f"{verdict}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
