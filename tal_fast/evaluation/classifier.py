"""Predictions of a trained classifier for image files, images and arrays, with its abstentions."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tal_fast.data.headers import UnreadableImage
from tal_fast.data.preprocessing import Preprocessing
from tal_fast.evaluation.calibrate_command import CALIBRATED
from tal_fast.evaluation.calibration import limits_of
from tal_fast.evaluation.export import GRAPHS, JSON, SelectiveClassifier, onnx_session, read_about
from tal_fast.runs.checkpoint import FOLDER
from tal_fast.runs.load import load_run
from tal_fast.runs.predictions import weights_hash
from tal_fast.utils.arrays import Floats
from tal_fast.utils.distributed import choose_device

CHUNK = 8
"""Images that a thread decodes at a time: handing over each of 32 x 32 pixels alone takes a fifth of the time."""


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image."""

    class_name: str
    confidence: float  # score that the threshold is for; higher = more confident
    accepted: bool | None  # whether the confidence is above the threshold; None without a threshold
    top: tuple[tuple[str, float], ...]  # the most probable classes and their softmax probabilities, best first
    error: str = ""  # reason that the file could not be read; all else is then empty


class Classifier:
    """Classifier that abstains, from a run or an ONNX export: ``Classifier("runs/tal")(["a.jpg", "b.png"])``.

    Args:
        path: folder of a run, whose best checkpoint is taken, or the calibrated one if ``calibrated/`` is in it, with
            its threshold; a folder that ``tal-fast export --format onnx`` wrote, or its ``.onnx`` file.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...; ONNX Runtime runs on the CPU.
        batch_size: images per pass of the network.
        workers: threads that decode files; by default one for each core.

    Attributes:
        class_names: name of each class.
        score: name of the confidence score, a key of ``tal_fast.scores.SCORES``.
        threshold: confidence above which a prediction is accepted, a number or (classes,) of them by predicted class;
            −inf accepts all, None if none was chosen.
        about: content of ``threshold.json``; empty without a threshold.

    Raises:
        ValueError: no run or export there, one without metadata, or a calibration of other weights.
    """

    def __init__(
        self, path: str | Path, *, device: str = "auto", batch_size: int = 64, workers: int | None = None
    ) -> None:
        for name, value in (("batch_size", batch_size), ("workers", 1 if workers is None else workers)):
            if value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
        self._batch_size, self._workers = batch_size, workers or os.cpu_count() or 1
        path = Path(path)
        if path.is_dir() and (path / GRAPHS["onnx"]).is_file():
            path /= GRAPHS["onnx"]
        if path.suffix == ".onnx":
            self._open_onnx(path)
        elif (path / FOLDER).is_dir():
            self._open_run(path, choose_device(device))
        elif path.suffix == ".pt2" or (path / GRAPHS["torch-export"]).is_file():
            raise ValueError(
                f"{path} is a program of torch.export, which may run code when it is loaded; name the run itself, or "
                "export it with --format onnx"
            )
        else:
            raise ValueError(f"{path} is neither a run of tal_fast.train nor an ONNX export of tal_fast.export")

    def _open_onnx(self, path: Path) -> None:
        try:
            self._session = onnx_session(str(path))
        except ValueError:
            raise
        except Exception as error:  # of ONNX Runtime's own types
            raise ValueError(f"{path} cannot be opened by ONNX Runtime ({type(error).__name__})") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "class_names" not in metadata:
            raise ValueError(f"{path} has no metadata of tal_fast.export; export the run again")
        self.about: dict[str, Any] = {name: json.loads(value) for name, value in metadata.items()}
        self.class_names = tuple(self.about["class_names"])
        self.preprocessing = Preprocessing.from_dict(self.about)
        self.score, self.threshold = self.about["score"], _threshold(self.about)
        self._run_batch = self._run_onnx

    def _open_run(self, path: Path, device: str) -> None:
        calibrated = path / CALIBRATED / JSON
        self.about = read_about(calibrated) if calibrated.is_file() else {}
        run = load_run(path, "best" if self.about.get("checkpoint", "best") == "best" else "last", device)
        if self.about and self.about.get("weights_sha256") != weights_hash(run.model):
            raise ValueError(f"{calibrated} is of other weights than {run.checkpoint}; calibrate again")
        self.class_names = run.class_names
        self.preprocessing = Preprocessing.of(run.config.data, run.image_size, run.loader)
        self.score, self.threshold = self.about.get("score", run.score), _threshold(self.about)
        bound = math.inf if self.threshold is None else self.threshold
        self._model = SelectiveClassifier(run.model, self.score, bound).to(device).eval()
        self._device = device
        self._run_batch = self._run_torch

    def __call__(self, images: Any, top_k: int = 1) -> list[Prediction]:
        """Classify images.

        Args:
            images: one image or an iterable of them: a path; a PIL image; an array (H, W), (H, W, 1) or (H, W, 3) of
                uint8. Or a float tensor (B, C, S, S) of images that are preprocessed and normalized already.
            top_k: number of classes in ``Prediction.top``.

        Raises:
            UnreadableImage: a file is no image or does not decode.
            ValueError: an image of another kind, or ``top_k`` out of range.
        """
        if isinstance(images, Tensor):
            self._check_top_k(top_k)
            self.preprocessing.check(images)
            return [p for batch in images.float().split(self._batch_size) for p in self._classify(batch, top_k)]
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
            images = [images]
        return list(self.stream(images, top_k, skip_unreadable=False))

    def stream(self, images: Iterable[Any], top_k: int = 1, skip_unreadable: bool = True) -> Iterator[Prediction]:
        """Classify images one batch at a time, in their order, decoding ahead on threads.

        Arguments and errors are those of a call, without tensors. With ``skip_unreadable``, the prediction for a file
        that cannot be read has its reason as ``error``.
        """
        self._check_top_k(top_k)
        normalize = self.preprocessing.normalizer()
        decoded = self._decoded(iter(images))
        while rows := list(itertools.islice(decoded, self._batch_size)):
            if not skip_unreadable and (error := next((row for row in rows if isinstance(row, UnreadableImage)), None)):
                raise error
            pixels = [row for row in rows if isinstance(row, np.ndarray)]
            batch = normalize(torch.from_numpy(np.stack(pixels))) if pixels else None
            predictions = iter(() if batch is None else self._classify(batch, top_k))
            for row in rows:
                read = isinstance(row, np.ndarray)
                yield next(predictions) if read else Prediction("", math.nan, None, (), str(row))

    def _decoded(self, images: Iterator[Any]) -> Iterator[np.ndarray | UnreadableImage]:
        """Pixels (S, S, C) uint8 of each image, or the error of its file; a batch and a chunk a thread ahead."""
        waiting: deque[Future[list[np.ndarray | UnreadableImage]]] = deque()
        ahead = self._workers + -(-self._batch_size // CHUNK)
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                while True:
                    while len(waiting) < ahead and (chunk := list(itertools.islice(images, CHUNK))):
                        waiting.append(pool.submit(lambda c: [self._pixels(image) for image in c], chunk))
                    if not waiting:
                        return
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _pixels(self, image: Any) -> np.ndarray | UnreadableImage:
        if isinstance(image, (str, os.PathLike)):
            try:
                return self.preprocessing.read(os.fspath(image))
            except UnreadableImage as error:
                return error
        return self.preprocessing.pixels(image)

    def _check_top_k(self, top_k: int) -> None:
        if not 1 <= top_k <= len(self.class_names):
            raise ValueError(f"top_k is {top_k} but must be 1 to {len(self.class_names)}, the number of classes")

    def _classify(self, images: Tensor, top_k: int) -> list[Prediction]:
        classes, confidences, accepted, logits = self._run_batch(images)
        probabilities, names = torch.from_numpy(logits).double().softmax(1).topk(top_k, 1)
        return [
            Prediction(
                self.class_names[int(classes[i])],
                float(confidences[i]),
                None if self.threshold is None else bool(accepted[i]),
                tuple((self.class_names[int(c)], float(p)) for c, p in zip(names[i], probabilities[i], strict=True)),
            )
            for i in range(len(images))
        ]

    def _run_torch(self, images: Tensor) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.cpu().numpy() for output in self._model.decide(images.to(self._device))]

    def _run_onnx(self, images: Tensor) -> list[np.ndarray]:
        outputs = self._session.run(["prediction", "confidence", "accepted", "logits"], {"images": images.numpy()})
        return cast("list[np.ndarray]", outputs)


def _threshold(about: dict[str, Any]) -> float | Floats | None:
    """Threshold in ``threshold.json``; None if there is no file, or no risk was given."""
    return None if about.get("risk") is None else limits_of(about)
