"""DCNv3 at the stages of InternImage, against compositions of grid_sample."""

from __future__ import annotations

from benchmarks.cases.interface import Target
from benchmarks.cases.weighted import Weighted, contenders
from benchmarks.cases.windows import CASES, INPUTS_TEXT

OPERATOR = Weighted(
    "dcnv3",
    INPUTS_TEXT,
    CASES,
    contenders("dcnv3"),
    (Target("forward", "fastest", 1.5), Target("backward", "torch", 8)),
    memory_cases=("d1",),
    start_cases=("c1",),
)
