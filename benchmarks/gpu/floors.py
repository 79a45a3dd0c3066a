"""What no kernel can beat: the floors of each row on a GPU, the minimum cost of torchvision's approach, and what is
planned.

`python -m benchmarks.gpu.floors` prints the tables, as does `python -m benchmarks.gpu --floors`; docs/design/gpu.md
contains them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from benchmarks.cases.layers import CASES
from benchmarks.gpu import problems
from benchmarks.gpu.page import tell
from benchmarks.gpu.reference import SIGNED
from benchmarks.harness.report import number, table
from benchmarks.harness.targets import geometric_mean
from benchmarks.rivals.layer import Case

COMMAND = "python -m benchmarks.gpu.floors"
ROWS = ("S1", "S2", "S3", "S4", "S5a", "S5b", "S6", "S7")
DENSE = ("S1", "S2", "S3", "S4", "S5a", "S5b", "S6")  # rows in the means: S7 has hardly any product
BATCHES = (1, 16)
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
GRAD_BYTES = 4  # gradients of x are accumulated in float32


class Rates(NamedTuple):
    """What a GPU achieves per second, in practice."""

    memory: float  # bytes
    l2: float
    float32: float  # operations
    tf32: float
    half: float
    source: str = "nominal"

    def operations(self, dtype: str) -> float:
        return {"float32": self.float32, "tf32": self.tf32}.get(dtype, self.half)


H100 = Rates(3.0e12, 5.5e12, 60e12, 400e12, 800e12, "nominal for an H100")
NOMINAL = {  # a word in the GPU's name -> its rates; the first match counts
    "H200": H100._replace(memory=4.2e12, source="nominal for an H200"),
    "H100": H100,
    "A100": Rates(1.5e12, 4.0e12, 18e12, 130e12, 260e12, "nominal for an A100"),
    "L40": Rates(0.8e12, 4.0e12, 70e12, 80e12, 160e12, "nominal for an L40"),
    "4090": Rates(0.95e12, 4.5e12, 70e12, 80e12, 160e12, "nominal for an RTX 4090"),
}


def nominal(name: str) -> Rates:
    """The rates of a GPU of this name; if it is not listed, an H100's, labelled as such."""
    found = next((rates for word, rates in NOMINAL.items() if word in name), None)
    return found or H100._replace(source="nominal for an H100, as this GPU is not listed")


def row(name: str, batch: int) -> Case:
    """A row with `batch` times its images."""
    case = CASES[name]
    return case._replace(n=case.n * batch)


class Floor(NamedTuple):
    """The minimum cost of a row."""

    moved: float  # bytes of all arrays, each read or written once
    operations: float
    corners: float  # bytes of corners read by samples, and in the backward added to, through L2

    def seconds(self, rates: Rates, dtype: str) -> dict[str, float]:
        return {
            "memory": self.moved / rates.memory,
            "product": self.operations / rates.operations(dtype),
            "L2": self.corners / rates.l2,
        }

    def bound(self, rates: Rates, dtype: str) -> tuple[str, float]:
        """The limiting resource, and its seconds."""
        seconds = self.seconds(rates, dtype)
        name = max(seconds, key=lambda key: seconds[key])
        return name, seconds[name]


def elements(case: Case, name: str) -> int:
    total = 1
    for size in case.shapes.get(name, (0,)):
        total *= size
    return total


def samples(case: Case) -> int:
    """Over all channels: the size of torchvision's column buffer in numbers."""
    height, width = case.out_size
    return case.n * case.c * case.taps * height * width


def floor(case: Case, direction: str, dtype: str) -> Floor:
    """The floor of a row: `dtype` is float32, tf32, float16 or bfloat16."""
    size = BYTES[dtype]
    arrays = sum(elements(case, name) for name in ("x", "offsets", "mask", "w", "y"))
    product = 2 * elements(case, "y") * case.c // case.groups * case.taps
    corners = 4 * samples(case)
    if direction == "forward":
        return Floor(arrays * size, product, corners * size)
    gradients = sum(elements(case, name) for name in case.differentiable)
    return Floor((arrays + gradients) * size, 2 * product, corners * (size + GRAD_BYTES))


def weighted_cases() -> dict[str, Any]:
    """The timed cases of ms_deform_attn, dcnv3 and dcnv4, by row."""
    return {f"{name} {label}": case for name, cases in problems.CASES.items() for label, case in cases.items()}


def weighted_floor(case: Any, direction: str, dtype: str) -> Floor:
    """The floor of such a row. Few queries do not read every pixel. Locations and offsets stay float32 beside half
    images. A sample costs four multiply-adds per channel, its gradients eight, in float32 for half types too."""
    size = BYTES[dtype]
    moved = {name: math.prod(shape) * (4 if name in SIGNED else size) for name, shape in case.shapes.items()}
    image, gathered = case.differentiable[0], math.prod(case.layout.rows) * case.layout.depth
    arrays = sum(moved.values()) - moved[image] + min(moved[image], 4 * gathered * size)
    if direction == "forward":
        return Floor(arrays, 8 * gathered, 4 * gathered * size)
    gradients = sum(moved[name] for name in case.differentiable)
    return Floor(arrays + gradients, 16 * gathered, 4 * gathered * (size + GRAD_BYTES))


def weighted_bound(case: Any, direction: str, dtype: str, rates: Rates) -> tuple[str, float]:
    """The resource that limits it, and its seconds."""
    return weighted_floor(case, direction, dtype).bound(rates, "float32")


# Assumed fraction of each unit's rate that the planned kernels reach, and torchvision's.
PLANNED = {"memory": 0.85, "L2": 0.60}
RIVAL_SCALAR = 0.25  # of L2: one thread per sample and channel, planes of x, 4-byte reads
RIVAL_ATOMIC = 0.125  # of L2: scalar atomics


MULTIPROCESSORS = 132


def tile(case: Case) -> tuple[int, int]:
    """Pixels and outputs of the forward's tile."""
    outs = case.c_out // case.groups
    return (128, 64) if outs <= 64 else (128, 128) if outs <= 128 else (64, 256)


def share_of_blocks(case: Case) -> float:
    """The fraction of the GPU that the forward's tiles keep busy, in whole waves; if there are few, their taps are
    divided."""
    if case.groups == case.c:  # no tiles: results one by one
        return 1.0
    (rows, columns), (height, width) = tile(case), case.out_size
    blocks = -(-case.n * height * width // rows) * -(-case.c_out // case.groups // columns) * case.groups
    blocks *= max(1, min(2 * MULTIPROCESSORS // blocks, case.taps))
    return blocks / (-(-blocks // MULTIPROCESSORS) * MULTIPROCESSORS)


def missed(case: Case, dtype: str) -> float:
    """The share of corners that a tile of 8 x 16 pixels reads from L2, as `benchmarks.gpu.reuse` simulates for offsets N(0, 2):
    little, if L1 (192 KB) holds what a tap reads of all channels, some 16 x 24 pixels."""
    return 0.09 if 16 * 24 * case.c * BYTES[dtype] <= 200e3 else 0.49


def product_share(dtype: str) -> float:
    """The share of a product's rate that the instructions of the fused loops allow; see `two_step.RATES`."""
    from numdcn._cuda.conv import two_step

    kind = dtype if dtype in two_step.RATES else "half"
    return two_step.RATES[kind].fused / H100.operations(dtype)


def through_l2(case: Case, direction: str, dtype: str) -> float:
    """Bytes the kernels move through L2: corners that are not in L1, as often as they are read, what is added, and the other
    operands of the products."""
    size, outs = BYTES[dtype], case.c_out // case.groups
    if case.groups == case.c:
        return floor(case, direction, dtype).corners
    if direction == "forward":  # samples once per block of outputs, weights once per tile of pixels
        rows, columns = tile(case)
        each = -(-outs // columns) * (4 * missed(case, dtype) + columns / rows) * size
    else:
        rows = 64 if outs <= 64 else 128 if outs <= 128 or dtype == "float32" else 256
        made = (
            4 * (missed(case, dtype) * size + GRAD_BYTES) + outs * size / 32
        )  # tiles of 64 x 64: grad_y and the weights
        samples_again = -(-outs // rows) * (4 * missed(case, dtype) + rows / 64) * size
        each = made + samples_again  # grad_w, which reads grad_y per 64 channels
    return samples(case) * each


def planned(case: Case, direction: str, dtype: str, rates: Rates) -> float:
    """Predicted seconds of the kernels: the slowest resource of the fused kernel, plus the copies to and from
    channels-last."""
    seconds = floor(case, direction, dtype).seconds(rates, dtype)
    share = share_of_blocks(case) if direction == "forward" else 1.0
    l2 = through_l2(case, direction, dtype) / rates.l2 / PLANNED["L2"]
    fused = max(seconds["memory"] / PLANNED["memory"], seconds["product"] / product_share(dtype), l2) / share
    copied = 2 * elements(case, "x") * BYTES[dtype]
    if direction == "backward":
        copied += elements(case, "x") * (2 * GRAD_BYTES + BYTES[dtype])  # cleared, read, written
    return fused + copied / (rates.memory * PLANNED["memory"])


LIBRARY = 0.80  # of a product's rate: cuBLAS


def first_reads(case: Case) -> float:
    """The share of corners that the blocks of `make_columns` read from L2 rather than from L1, simulated for patches of 4 x 8
    pixels and offsets N(0, 2): many offset groups leave a block one tap."""
    return 0.60 if case.offset_groups > 1 else 0.37 if case.stride > 1 else 0.25


def two_steps(case: Case, direction: str, dtype: str, rates: Rates) -> float:
    """Predicted seconds in two steps, with the product of torch or CuPy: one kernel after the other. Half of what is written
    and read again, columns and products, stays in L2."""
    size, numbers, memory = BYTES[dtype], samples(case), rates.memory * PLANNED["memory"]
    slab = 2 / (1 / memory + 1 / (rates.l2 * PLANNED["L2"]))
    product = floor(case, "forward", dtype).operations / rates.operations(dtype) / LIBRARY
    read = 4 * numbers * size * first_reads(case) / rates.l2 / PLANNED["L2"]
    columns = read + 2 * numbers * size / slab
    x, y = elements(case, "x"), elements(case, "y")
    if direction == "forward":  # x packed; the product written and read, y written
        return columns + product + y * 2 * GRAD_BYTES / slab + (2 * x + y) * size / memory
    gradients = 2 * numbers * GRAD_BYTES / slab
    added = 4 * numbers * GRAD_BYTES / rates.l2 / PLANNED["L2"]
    images = (
        2 * (x + y) * size + x * (2 * GRAD_BYTES + size)
    ) / memory  # x and grad_y packed, the gradient of x unpacked
    return 2 * product + columns + gradients + read + added + images


def chosen(case: Case, direction: str, dtype: str) -> bool:
    """Whether numdcn takes two steps where they are possible."""
    from numdcn._call.convolution import Convolution
    from numdcn._cuda.conv import two_step

    p = Convolution(
        case.n, case.c, case.c_out, (case.h, case.w), case.out_size, (case.kernel,) * 2, (case.stride,) * 2,
        (case.padding,) * 2, (case.dilation,) * 2, case.groups, case.offset_groups, case.taps, int(case.mask),
    )  # fmt: skip
    if p.groups == p.in_channels:  # no vector of channels shares a group
        return False
    kind = dtype if dtype in two_step.RATES else "half"
    what = two_step.FORWARD if direction == "forward" else two_step.BACKWARD
    return two_step.saved(p, kind, BYTES[dtype], what) > two_step.LAUNCHES


def rival(case: Case, direction: str, dtype: str, rates: Rates) -> float:
    """Seconds of torchvision's approach: columns written and read, a product for each of them; plus its own
    sampling."""
    size = BYTES[dtype]
    columns = samples(case) * size / (rates.memory * PLANNED["memory"])
    product = floor(case, "forward", dtype).operations / rates.operations(dtype) / 0.8
    read = 4 * samples(case) * size / rates.l2 / RIVAL_SCALAR
    if direction == "forward":
        return read + 2 * columns + product
    # column gradients: written, then read for x and again for offsets and mask; columns: recomputed, written, read
    added = 4 * samples(case) * GRAD_BYTES / rates.l2 / RIVAL_ATOMIC
    return 2 * product + 5 * columns + 2 * read + added


def ms(seconds: float) -> str:
    """Milliseconds, with three decimals or two significant digits."""
    return f"{1e3 * seconds:.2g}" if seconds < 1e-5 else number(1e3 * seconds)


def floors_table(direction: str, rates: Rates = H100) -> list[str]:
    """Floors of every row: bytes, operations, L2; the limiting one. Bytes are those of float32 / half arrays."""
    head = [
        "row",
        "batch",
        "MB moved",
        "memory ms",
        "GFLOP",
        "product ms: float32 / tf32 / half",
        "corners GB",
        "L2 ms",
    ]
    head += ["decides: float32 / tf32 / half"]
    rows = []
    for name in ROWS:
        for batch in BATCHES:
            wide, narrow = both = [floor(row(name, batch), direction, dtype) for dtype in ("float32", "float16")]
            dtypes = ("float32", "tf32", "float16")
            bounds = [one.bound(rates, dtype)[0] for one, dtype in zip((wide, wide, narrow), dtypes, strict=True)]
            cells = [
                [number(one.moved / 1e6) for one in both],
                [ms(one.moved / rates.memory) for one in both],
                [number(wide.operations / 1e9)],
                [ms(wide.operations / rates.operations(dtype)) for dtype in dtypes],
                [number(one.corners / 1e9) for one in both],
                [ms(one.corners / rates.l2) for one in both],
                bounds,
            ]
            rows.append([name, str(batch), *map(" / ".join, cells)])
    return table(head, rows)


def weighted_table(direction: str, rates: Rates = H100) -> list[str]:
    """The same of attention, DCNv3 and DCNv4."""
    head = ["row", "case", "MB moved", "memory ms", "GFLOP", "float32 ms", "corners GB", "L2 ms", "decides"]
    rows = []
    for name, case in weighted_cases().items():
        both = [weighted_floor(case, direction, dtype) for dtype in ("float32", "float16")]
        cells = [
            [number(one.moved / 1e6) for one in both],
            [ms(one.moved / rates.memory) for one in both],
            [number(both[0].operations / 1e9)],
            [ms(both[0].operations / rates.float32)],
            [number(one.corners / 1e9) for one in both],
            [ms(one.corners / rates.l2) for one in both],
            [one.bound(rates, "float32")[0] for one in both],
        ]
        rows.append([name, case.text, *map(" / ".join, cells)])
    return table(head, rows)


RIVAL = {"float32": "float32", "tf32": "float32", "float16": "float16"}  # the torchvision type each is compared with
TARGETS = {  # speed relative to torchvision, mean over S1 to S6 at batch 16; tf32 against its float32
    "forward": {"float32": 1.5, "tf32": 2.0, "float16": 3.0},
    "backward": {"float32": 2.0, "float16": 3.0},
}


def plans_table(direction: str, rates: Rates = H100) -> list[str]:
    """Predicted milliseconds of the kernels and of torchvision's approach, and their ratios next to their targets."""
    head = ["row", "batch", *RIVAL, "torchvision float32", "torchvision float16"]
    head += [f"times as fast: {dtype}" for dtype in RIVAL]
    rows, means = [], []
    for name in ROWS:
        for batch in BATCHES:
            case = row(name, batch)
            own = [planned(case, direction, dtype, rates) for dtype in RIVAL]
            theirs = {dtype: rival(case, direction, dtype, rates) for dtype in ("float32", "float16")}
            over = [theirs[rival_kind] / seconds for rival_kind, seconds in zip(RIVAL.values(), own, strict=True)]
            rows.append([name, str(batch), *map(ms, [*own, *theirs.values()]), *map(number, over)])
            means += [over] if batch == 16 and name in DENSE else []
    means_text = [number(geometric_mean(values)) for values in zip(*means, strict=True)]
    wanted = [f"{TARGETS[direction][dtype]:g}" if dtype in TARGETS[direction] else "" for dtype in RIVAL]
    rows.append(["S1 to S6, geometric mean", "16", *[""] * 5, *means_text])
    rows.append(["wanted", "16", *[""] * 5, *wanted])
    return table(head, rows)


def forms_table(direction: str, rates: Rates = H100) -> list[str]:
    """Predicted milliseconds in two steps, in bold where `two_step.choose` takes them; times as fast as torchvision in the
    form that is chosen."""
    head = ["row", "batch", *(f"two steps: {dtype}" for dtype in RIVAL)]
    head += [f"chosen, times as fast: {dtype}" for dtype in RIVAL]
    rows, means = [], []
    for name in ROWS:
        for batch in BATCHES:
            case = row(name, batch)
            if case.groups == case.c:
                continue
            cells, over = [], []
            for dtype, rival_kind in RIVAL.items():
                seconds, taken = two_steps(case, direction, dtype, rates), chosen(case, direction, dtype)
                cells.append(f"**{ms(seconds)}**" if taken else ms(seconds))
                own = seconds if taken else planned(case, direction, dtype, rates)
                over.append(rival(case, direction, rival_kind, rates) / own)
            rows.append([name, str(batch), *cells, *map(number, over)])
            means += [over] if batch == 16 else []
    means_text = [number(geometric_mean(values)) for values in zip(*means, strict=True)]
    rows.append(["S1 to S6, geometric mean", "16", *[""] * 3, *means_text])
    return table(head, rows)


def text() -> str:
    """All tables, as in docs/design/gpu.md."""
    lines = []
    for direction in ("forward", "backward"):
        lines += [f"Floors, {direction}:", "", *floors_table(direction)]
    for direction in ("forward", "backward"):
        lines += [f"Floors of attention, DCNv3 and DCNv4, {direction}:", "", *weighted_table(direction)]
    for direction in ("forward", "backward"):
        lines += [f"Predicted milliseconds, {direction}:", "", *plans_table(direction)]
    for direction in ("forward", "backward"):
        lines += [f"Predicted milliseconds in two steps, {direction}:", "", *forms_table(direction)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    tell(COMMAND, text())
