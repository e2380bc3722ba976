"""FMFP with the loss of TAL."""

from __future__ import annotations

from tal_fast.config.methods import FMFPTALOptions
from tal_fast.methods.fmfp import FlatMinima
from tal_fast.methods.tal import TAL


class FMFPTAL(FlatMinima, TAL):
    """FMFP with TAL's loss, as in the tables of the TAL paper, judged by the cosine score.

    Misclassified samples keep the temperature of their typicalness, as in the released code. The queue is updated once
    per step, in the pass whose gradient the weights follow.
    """

    name = "fmfp-tal"
    score = "cosine"
    Options = FMFPTALOptions
