"""Classes of ImageNet's validation images, which unpack to 50,000 files in one folder.

The classes are in the development kit (numbers in ``data/ILSVRC2012_validation_ground_truth.txt``, names in
``data/meta.mat``) or in ``LOC_val_solution.csv`` of Kaggle. Either is next to ``train`` and ``val``, or in a folder
above, as in Kaggle's archive.
"""

from __future__ import annotations

import csv
from pathlib import Path

from tal_fast.data.matlab import read_mat
from tal_fast.data.text import read_text

GROUND_TRUTH, META, SOLUTION = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"
_KITS = ("", "data", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data")
_PARENTS = 3
"""Number of parent folders to search: CLS-LOC, Data and ILSVRC in Kaggle's archive."""


def validation_classes(root: Path) -> dict[str, str]:
    """Class folder in ``train`` (a WordNet id) of each validation image, by its file name without the ending.

    ``root`` holds ``train`` and ``val``. Raises ValueError if the file of the classes is missing or damaged.
    """
    root = root.absolute()
    for folder in (root, *list(root.parents)[:_PARENTS]):
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
    try:
        rows = list(csv.reader(read_text(path).splitlines()))
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); get it again") from None
    complete = all(len(row) > 1 and row[1].split() for row in rows)
    if not rows or not complete or rows[0][:2] != ["ImageId", "PredictionString"]:
        raise ValueError(f"{path} has no columns ImageId,PredictionString with a class in each line; get it again")
    return {row[0]: row[1].split()[0] for row in rows[1:]}


def _development_kit(folder: Path) -> dict[str, str]:
    truth = folder / GROUND_TRUTH
    if not (folder / META).is_file():
        raise ValueError(f"{truth} numbers the classes, but {META}, which names them, is not beside it; add it")
    try:
        synsets = read_mat(folder / META, "synsets", squeeze=True)
        names = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
        numbers = [int(line) for line in read_text(truth).split()]
        return {f"ILSVRC2012_val_{i:08d}": names[number] for i, number in enumerate(numbers, 1)}
    except Exception as error:  # of many types, for other files
        raise ValueError(
            f"{truth} and {META} are not those of ImageNet's development kit ({type(error).__name__}); get them again"
        ) from error
