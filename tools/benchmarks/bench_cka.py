"""The CKA matrix of all layer pairs against a pair-by-pair loop, on the same rows (spec 9).

    python tools/benchmarks/bench_cka.py [--threads 1] [--repeats 3] [--json]

28 teacher × 12 student layers, 4,096 rows, widths of 4 KV heads of 128 and of 64. A loop over all 336 pairs takes
minutes, so it is timed on some of them and scaled; every pair costs the same. Two loops, in double precision: one that
builds both Gram matrices for every pair (what public CKA code does), and one over features, without Gram matrices.
Times are processor time, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kvpipe.align.layer import StreamingCKA, cka_matrix

SRC_LAYERS, DST_LAYERS, ROWS, SRC_WIDTH, DST_WIDTH, BATCH_ROWS = 28, 12, 4096, 4 * 128, 4 * 64, 256


def features() -> tuple[Tensor, Tensor]:
    """Teacher and student features that share a signal which fades over depth, so that the matrix is not all zeros."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(ROWS, 64, generator=generator)

    def side(layers: int, width: int) -> Tensor:
        maps = torch.randn(layers, 64, width, generator=generator) * torch.linspace(1, 0.1, layers)[:, None, None]
        return signal @ maps + 4 * torch.randn(layers, ROWS, width, generator=generator)

    return side(DST_LAYERS, DST_WIDTH), side(SRC_LAYERS, SRC_WIDTH)


def hsic_gram(k: Tensor, m: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices with zero diagonals, up to a factor (Song et al. 2012, eq. 5)."""
    n = len(k)
    rows_k, rows_m = k.sum(1), m.sum(1)
    return (k * m).sum() + rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows_k @ rows_m)


def pair_by_gram(x: Tensor, y: Tensor) -> list[Tensor]:
    """The three HSIC of one pair from its two Gram matrices."""
    k, m = ((side @ side.T).fill_diagonal_(0) for side in (x, y))
    return [hsic_gram(k, m), hsic_gram(k, k), hsic_gram(m, m)]


def pair_by_features(x: Tensor, y: Tensor) -> list[Tensor]:
    """The three HSIC of one pair from its features."""
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        rows_a, rows_b = a.square().sum(1), b.square().sum(1)
        cross = (a.T @ b).square().sum()
        return cross - n / (n - 2) * (rows_a @ rows_b) + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))

    return [hsic(x, y), hsic(x, x), hsic(y, y)]


def loop(dst: Tensor, src: Tensor, pairs: list[tuple[int, int]], pair: Callable, batch_rows: int) -> Tensor:
    """CKA of some pairs, one after another, HSIC summed over minibatches."""
    result = []
    for i, j in pairs:
        parts = zip(dst[i].split(batch_rows), src[j].split(batch_rows), strict=True)
        terms = [pair(x.double(), y.double()) for x, y in parts]
        cross, own_x, own_y = (sum(column) for column in zip(*terms, strict=True))
        result.append(cross / (own_x * own_y).sqrt())
    return torch.stack(result)


def streamed(dst: Tensor, src: Tensor) -> Tensor:
    """All pairs, minibatch by minibatch."""
    stream = StreamingCKA(batch_rows=BATCH_ROWS)
    for start in range(0, ROWS, BATCH_ROWS):
        stream.update(dst[:, start : start + BATCH_ROWS], src[:, start : start + BATCH_ROWS])
    return stream.compute()


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median processor time of `function`."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    """Prints one row per form: seconds for all pairs of the loop and of ours, their ratio and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=4, help="pairs timed in each loop, scaled to all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dst, src = features()
    step = SRC_LAYERS * DST_LAYERS // arguments.pairs
    pairs = [divmod(number * step, SRC_LAYERS) for number in range(arguments.pairs)]
    rows = []
    for name, ours, batch_rows in (
        ("streaming, minibatches of 256", lambda: streamed(dst, src), BATCH_ROWS),
        ("full batch", lambda: cka_matrix(dst, src), ROWS),
    ):
        matrix = ours()
        seconds = median_seconds(ours, arguments.repeats)
        for pair in (pair_by_gram, pair_by_features):
            one_by_one = loop(dst, src, pairs, pair, batch_rows)
            difference = (one_by_one - torch.stack([matrix[i, j] for i, j in pairs])).abs().max().item()
            part = median_seconds(lambda p=pair, b=batch_rows: loop(dst, src, pairs, p, b), arguments.repeats)
            total = part * SRC_LAYERS * DST_LAYERS / arguments.pairs
            rows.append(
                {
                    "form": name,
                    "loop": pair.__name__,
                    "loop_seconds": total,
                    "seconds": seconds,
                    "ratio": total / seconds,
                    "max_difference": difference,
                }
            )
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print("| form | loop over pairs | loop, s | ours, s | ratio | largest difference |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['form']} | {row['loop']} | {row['loop_seconds']:.1f} | {row['seconds']:.2f} | {row['ratio']:.1f}× "
            f"| {row['max_difference']:.1e} |"
        )
    print(f"\nPeak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
