"""DCNv3 at the stages of InternImage, against compositions of grid_sample."""

from __future__ import annotations

from benchmarks.cases.weighted import Weighted, contenders
from benchmarks.cases.windows import CASES, INPUTS_TEXT, TARGETS

OPERATOR = Weighted(
    "dcnv3",
    INPUTS_TEXT,
    CASES,
    contenders("dcnv3"),
    TARGETS,
    memory_cases=("d1",),
    start_cases=("c1",),
)
