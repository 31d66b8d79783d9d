"""Processes that `torchrun` has started, which wait for each other."""

import contextlib
import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from timm_tresnet.collection.outputs import Output

_LONGEST_WAIT = datetime.timedelta(days=30)  # of one process for the last of the others


@contextlib.contextmanager
def together(processes: int, names: Sequence[str]) -> Iterator[Callable[[Counter[str]], Counter[str]]]:
    """Connect processes.

    Args:
        processes: how many these are.
        names: of what is counted.

    Yields:
        A function that waits until all processes have called it, and returns the sum of their counts.
    """
    if processes == 1:
        yield lambda counts: counts
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)

    def add_up(counts: Counter[str]) -> Counter[str]:
        values = torch.tensor([counts[name] for name in names])
        try:
            torch.distributed.all_reduce(values)
        except RuntimeError as error:
            raise RuntimeError("another of the processes has ended, see what it says") from error
        return Counter(dict(zip(names, values.tolist(), strict=True)))

    try:
        yield add_up
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def shared(
    writer: Output, batch_size: int, is_first: bool, add_up: Callable[[Counter[str]], Counter[str]]
) -> Iterator[None]:
    """Open an output that several processes write, and join their parts at the end.

    Args:
        writer: the output, as this process has it.
        batch_size: with which files were dealt out.
        is_first: whether this process prepares and joins.
        add_up: of `together`; waits for the others.
    """
    add_up(Counter())  # all have looked at what is there
    if is_first:
        writer.prepare()
    add_up(Counter())
    with writer:
        add_up(Counter())  # all have read what is done
        yield
    add_up(Counter())
    if is_first:
        writer.join_parts(batch_size)
    add_up(Counter())
