"""DCNv4 at the stages of FlashInternImage, against compositions of grid_sample."""

from __future__ import annotations

from benchmarks.cases.weighted import Weighted, contenders
from benchmarks.cases.windows import CASES, INPUTS_TEXT, TARGETS

OPERATOR = Weighted(
    "dcnv4",
    INPUTS_TEXT,
    [case._replace(packed=True) for case in CASES],
    contenders("dcnv4"),
    TARGETS,
    memory_cases=("d1",),
    start_cases=("c1",),
)
