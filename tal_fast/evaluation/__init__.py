"""Evaluation of failure detection: how well confidence separates correct from incorrect predictions.

====================  =================================================================================================
module                contents
====================  =================================================================================================
``command``           options of ``python -m tal_fast.evaluate``
``sources``           evaluation of a training run, of weights, or of saved outputs (``npz``)
``pipeline``          from outputs to scores and metrics
``evaluation``        ``Evaluation``, the result that everything below is written from
``report``            ``report.json``; ``sample_scores``: ``samples.npz``; ``tables``: printed tables
``plots``, ``html``   PNG plots and ``report.html``, with the images that ``galleries`` chooses
``compare``           groups of runs; ``differences`` and ``compare_tables``: their differences and tables
``selective``         thresholds with a bounded risk; ``calibration``: on parts of the held-out samples
====================  =================================================================================================
"""
