"""The report as one HTML page to look at: ``python -m tal_fast.html_report RUN_OR_EVALUATION``.

Tables, curves, histograms and images in a single file without any outside resource; it is made from what an evaluation
saved (``report.json``, ``samples.npz``), and from the run's images and checkpoint for the galleries.
"""

from tal_fast.evaluation.html.gallery import Images
from tal_fast.evaluation.html.page import FILE, write_html

__all__ = ["FILE", "Images", "write_html"]
