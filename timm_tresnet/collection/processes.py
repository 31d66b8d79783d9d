"""Synchronise the processes that `torchrun` has started."""

import contextlib
import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from timm_tresnet.collection.outputs import Output

_LONGEST_WAIT = datetime.timedelta(days=30)  # of a process for the slowest one


@contextlib.contextmanager
def together(processes: int, names: Sequence[str]) -> Iterator[Callable[[Counter[str]], Counter[str]]]:
    """Connect processes.

    Args:
        processes: number of processes.
        names: names of the counts.

    Yields:
        A function that waits for all processes to call it and returns the sums of their counts.
    """
    if processes == 1:
        yield lambda counts: counts
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    # It outlives the group: in PyTorch 2.5, a thread of the group that frees a tensor and the end of the group can wait
    # for each other.
    values = torch.zeros(len(names), dtype=torch.int64)

    def add_up(counts: Counter[str]) -> Counter[str]:
        values.copy_(torch.tensor([counts[name] for name in names]))
        try:
            torch.distributed.all_reduce(values)
        except RuntimeError as error:
            raise RuntimeError("another process has ended; see its message") from error
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
        writer: this process's output.
        batch_size: files in a batch, by which files were shared.
        is_first: whether this process prepares the output and joins the parts.
        add_up: the function from `together`; it waits for the other processes.
    """
    add_up(Counter())  # all processes have checked the existing output
    if is_first:
        writer.prepare()
    add_up(Counter())
    with writer:
        add_up(Counter())  # all processes have read which files are done
        yield
    add_up(Counter())
    if is_first:
        writer.join_parts(batch_size)
    add_up(Counter())
