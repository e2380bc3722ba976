"""How well confidence tells right from wrong: ``python -m tal_fast.evaluate --run runs/digits-tal``.

One pass over the validation split and each OOD or shifted set gives logits and features, which are kept in a cache;
every score, setting and metric comes from them. Writes ``report.json``, ``samples.npz`` (scores of every sample),
``risk_coverage.png``, ``confidence_histogram.png`` and ``report.html``, a page to look at, and prints the report as
tables. ``--weights`` does the same for a network's weights from anywhere, ``--npz`` for outputs of any model.
``torchrun -m tal_fast.evaluate`` shares the passes among processes.

=============  =======================================================================================================
to find        look in
=============  =======================================================================================================
the options    ``command``, which turns them into a call of one of ``sources``
a way in       ``sources``: a run, weights or an ``.npz``, each up to its outputs
the passes     ``tal_fast.evaluation.predictions`` runs them, ``tal_fast.evaluation.prediction_store`` keeps what they give
which scores   ``wanted``; the scores themselves in ``tal_fast.scores`` and ``tal_fast.scores.features``
the report     ``outputs`` writes all files; ``tal_fast.metrics.settings`` says who takes part in Old FD, OOD, New FD and under
               shift, ``tal_fast.evaluation.report`` computes and prints, ``tal_fast.html_report`` makes the page
=============  =======================================================================================================
"""

from tal_fast.evaluation.command import main
from tal_fast.evaluation.pipeline import evaluate_outputs
from tal_fast.evaluation.predictions import CACHE
from tal_fast.evaluation.score_selection import DEFAULT_SCORES, check_scores
from tal_fast.evaluation.sources import evaluate_npz, evaluate_run, evaluate_weights

__all__ = [
    "CACHE", "DEFAULT_SCORES", "check_scores", "evaluate_npz", "evaluate_outputs", "evaluate_run", "evaluate_weights",
    "main",
]  # fmt: skip
