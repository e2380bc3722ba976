"""TAL under FMFP's sharpness-aware steps and averaged weights."""

from __future__ import annotations

import dataclasses

from tal_fast.config.schema import MethodConfig
from tal_fast.methods.base import Task
from tal_fast.methods.fmfp import FlatMinima
from tal_fast.methods.tal import TAL


class FMFPTAL(FlatMinima, TAL):
    """The combination of the paper's tables, judged by the cosine score.

    Wrong samples keep their own temperature, as in the released code: ``t_wrong`` is None whatever the configuration
    says. The queue is pushed once a step, by the gradient that the weights follow.
    """

    name = "fmfp-tal"
    score = "cosine"
    reads = TAL.reads - {"t_wrong"}

    def __init__(self, config: MethodConfig, task: Task) -> None:
        super().__init__(dataclasses.replace(config, t_wrong=None), task)
