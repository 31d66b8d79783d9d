"""Two alternatives that move less memory, timed: a blur by sums, and a gate's mean from the norm's statistics.

    python benchmarks/fewer_bytes.py --json benchmarks/results/fewer_bytes.json

Each row is a forward and backward of one part, in its present form and in the alternative, in turns, in one thread of
the CPU. Time is the thread's own. A ratio is the alternative's time over the present one's, both eager or both
compiled.

- blur: reflection and a depthwise 3x3 convolution with stride 2. Alternative: two sums of neighbours along each side,
  the last with stride 2, and a division by 16.
- mean: batch norm, squeeze-and-excitation, shortcut and activation, as at the end of a basic block. Alternative: the
  mean of the norm's output is computed from the means of its input, which also give the norm's statistics.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from command_line import format_command
from torch import Tensor, nn

from timm_tresnet.bench.measuring import choose_memory_format
from timm_tresnet.bench.results import format_spread, start_results, write_results
from timm_tresnet.cli.options import at_least, new_file
from timm_tresnet.models.layers import BlurPool2d, SqueezeExcite
from timm_tresnet.utils.tables import format_markdown

_REDUCED = 64  # least number of channels between the convolutions of TResNet's squeeze-and-excitation


class SummedBlur(nn.Module):
    """BlurPool2d with stride 2, computed by sums of neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [1, 1, 1, 1], mode="reflect")
        x = x[:, :, :-1] + x[:, :, 1:]
        x = x[:, :, :-1:2] + x[:, :, 1::2]
        x = x[..., :-1] + x[..., 1:]
        return (x[..., :-1:2] + x[..., 1::2]) / 16


class End(nn.Module):
    """End of a basic block whose shortcut is the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, _REDUCED)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.se(self.bn(x)) + x)


class EndFromStatistics(End):
    """`End` with the norm's statistics and the mean of its output computed from statistics of each image."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (2, 3), correction=0)  # (N, C)
        center = mean.mean(0)
        spread = (var + (mean - center).square()).mean(0)
        count = x.numel() / x.shape[1]
        with torch.no_grad():
            self.bn.running_mean.lerp_(center, self.bn.momentum)
            self.bn.running_var.lerp_(spread * count / (count - 1), self.bn.momentum)
            self.bn.num_batches_tracked.add_(1)
        scale = self.bn.weight * (spread + self.bn.eps).rsqrt()
        shift = self.bn.bias - center * scale
        pooled = (mean * scale + shift)[..., None, None]
        gate = torch.sigmoid(self.se.fc2(torch.relu(self.se.fc1(pooled))))
        return torch.relu((x * scale[:, None, None] + shift[:, None, None]) * gate + x)


def make_parts(channels: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Make each part and its alternative with the same weights."""
    end = End(channels)
    other = EndFromStatistics(channels)
    other.load_state_dict(end.state_dict())
    return {"blur": (BlurPool2d(channels), SummedBlur()), "mean": (end, other)}


def step(part: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of a part and the gradient of its input."""
    x = x.detach().requires_grad_()
    y = part(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), gradient


def measure(own: nn.Module, other: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    """Return milliseconds of both in each round, ratios, and the relative difference of the results."""
    pairs = zip(step(own, x), step(other, x), strict=True)
    apart = [((actual - expected).norm() / expected.norm()).item() for expected, actual in pairs]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for part, of_part in zip((own, other), times, strict=True):
            start = time.thread_time()
            step(part, x)
            of_part.append(1e3 * (time.thread_time() - start))
    ratios = [after / before for before, after in zip(*times, strict=True)]
    return {"ms": times[0], "other_ms": times[1], "ratios": ratios, "apart": max(apart)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the results."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="Time of two alternatives that move less memory.")
    parser.add_argument("--batch-size", type=at_least(1), default=8)
    parser.add_argument("--channels", type=at_least(1), default=64)
    parser.add_argument("--image-size", type=at_least(4), default=56, help="side of the feature map, in pixels")
    parser.add_argument("--rounds", type=at_least(1), default=15)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--eager-only", action="store_true", help="skip the compiled rows, which take a minute")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="file for the results, must not exist yet")
    settings = parser.parse_args(words)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = start_results(format_command(__file__, words), "cpu", settings)
    x = torch.randn(settings.batch_size, settings.channels, settings.image_size, settings.image_size)
    x = x.contiguous(memory_format=choose_memory_format(settings.channels_last))
    for name, pair in make_parts(settings.channels).items():
        results["rows"].append({"row": name, "mode": "eager", **measure(*pair, x, settings.rounds)})
        if not settings.eager_only:
            own, other = (torch.compile(part, fullgraph=True, dynamic=False) for part in pair)
            results["rows"].append({"row": name, "mode": "compiled", **measure(own, other, x, settings.rounds)})
    table = [
        [
            f"{row['row']}, {row['mode']}",
            f"{statistics.median(row['ms']):.2f}",
            format_spread(row["ratios"]),
            f"{row['apart']:.0e}",
        ]
        for row in results["rows"]
    ]
    print(format_markdown(["", "present, ms", "alternative", "relative difference"], table))
    if settings.json:
        write_results(results, settings.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
