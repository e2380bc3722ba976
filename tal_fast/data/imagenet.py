"""ImageNet's validation images as their archive unpacks: 50,000 files in one folder, their classes in a file elsewhere.

Two distributions say which is which: the development kit (``data/ILSVRC2012_validation_ground_truth.txt`` numbers the
classes, ``data/meta.mat`` names them) and Kaggle's (``LOC_val_solution.csv``). Either lies beside ``train`` and
``val``, or in one of the folders above, where Kaggle's archive has it.
"""

from __future__ import annotations

import csv
from pathlib import Path

GROUND_TRUTH, META, SOLUTION = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
_KITS = ("", "data", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data")
_ABOVE = 3
"""Folders between ``train`` and the top of Kaggle's archive: CLS-LOC, Data, ILSVRC."""


def validation_classes(root: Path) -> dict[str, str]:
    """Stem of each validation image's name -> name of its class's folder in ``train`` (a WordNet id).

    Args:
        root: the folder that holds ``train`` and ``val``.

    Raises:
        ValueError: there is no such file, or it cannot be read as one.
    """
    root = root.absolute()
    for folder in (root, *list(root.parents)[:_ABOVE]):
        if (folder / SOLUTION).is_file():
            return _solution(folder / SOLUTION)
        for kit in _KITS:
            if (folder / kit / GROUND_TRUTH).is_file():
                return _development_kit(folder / kit)
    raise ValueError(
        f"{root / 'val'} holds images without class folders; put ImageNet's ILSVRC2012_devkit_t12/ or {SOLUTION} into "
        f"{root}, or sort the images into one folder a class"
    )


def _solution(path: Path) -> dict[str, str]:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0][:2] != ["ImageId", "PredictionString"] or not all(len(r) > 1 and r[1] for r in rows[1:]):
        raise ValueError(f"{path} has no columns ImageId,PredictionString with a class in each line; fetch it anew")
    return {row[0]: row[1].split()[0] for row in rows[1:]}


def _development_kit(folder: Path) -> dict[str, str]:
    from scipy.io import loadmat

    truth = folder / GROUND_TRUTH
    if not (folder / META).is_file():
        raise ValueError(f"{truth} numbers the classes, but {META}, which names them, is not beside it; add it")
    try:
        synsets = loadmat(folder / META, squeeze_me=True)["synsets"]
        names = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        numbers = [int(line) for line in truth.read_text().split()]
        return {f"ILSVRC2012_val_{i:08d}": names[number] for i, number in enumerate(numbers, 1)}
    except Exception as error:  # loadmat fails in many ways on what is no such file
        raise ValueError(
            f"{truth} and {META} are not those of ImageNet's development kit ({type(error).__name__}); fetch them anew"
        ) from error
