"""Files of MATLAB that come with data sets."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tal_fast.config.typed import one_line
from tal_fast.utils.io import refuse_pipe
from tal_fast.utils.process import no_garbage


def read_mat(path: Path, name: str, squeeze: bool = False) -> Any:
    """Array ``name`` of a .mat file; ``squeeze`` removes dimensions of length 1.

    Raises ValueError, whose message is the reason, if the file cannot be read, is damaged, or has no such array.
    """
    refuse_pipe(path)
    # SciPy's reader crashes on some damaged files.
    with no_garbage(), ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_load, path, name, squeeze).result()
        except KeyError:
            reason = f"there is no array {name} in it"
        except BrokenProcessPool:
            reason = "its reader crashed"
        except Exception as error:  # of many types, for damaged files
            reason = one_line(error) or type(error).__name__
    raise ValueError(reason)


def _load(path: Path, name: str, squeeze: bool) -> Any:
    from scipy.io import loadmat

    return loadmat(path, variable_names=[name], squeeze_me=squeeze)[name]
