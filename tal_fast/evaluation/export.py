"""Exported classifiers: a network, a confidence score and a threshold as one graph for ``torch.export`` or ONNX.

The threshold is chosen on the scores of the exported graph itself, run on the CPU, and the graph's decisions are
compared with PyTorch's on the same validation images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import tal_fast
from tal_fast.config.names import is_own_score
from tal_fast.config.typed import one_line
from tal_fast.data.datasets import DataBundle, Split
from tal_fast.data.ood import ood_set, set_named
from tal_fast.data.preprocessing import Preprocessing
from tal_fast.evaluation.calibration import BY_CLASS, DEFAULTS, FORMAT, calibrate, parts, score_table, with_table
from tal_fast.evaluation.selective import NoThreshold
from tal_fast.runs.load import load_run
from tal_fast.runs.prediction_store import Outputs
from tal_fast.runs.predictions import CACHE, PassOptions, weights_hash
from tal_fast.scores.logits import SCORES, logit_scores
from tal_fast.utils.arrays import Floats, Ints
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import version_of
from tal_fast.utils.io import check_writable, replacing, write_text
from tal_fast.utils.locks import alone_in

JSON, STATE = "threshold.json", "selective.pt"
GRAPHS = {"torch-export": "selective.pt2", "onnx": "selective.onnx"}
"""Name of the graph's file by format."""

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest difference between the scores of the graph and of PyTorch in float32, relative to the largest score if that
exceeds 1. Largest of the msp, cosine and energy in ONNX Runtime, with random weights and normal random images: 3e-8 for
ResNet-18 (224 pixels) and 3e-7 for ResNet-8 (8 and 32 pixels) in fp32, 1.4e-4 and 7e-4 in fp16."""


class SelectiveClassifier(nn.Module):
    """Classifier that accepts predictions above a confidence threshold and abstains from the others.

    Args:
        model: images -> logits (B, C), or (logits, features).
        score: name from ``tal_fast.scores.SCORES``.
        threshold: a prediction is accepted if its confidence is strictly above; a number, or (classes,) of them by
            predicted class. Part of the state dict.
    """

    threshold: Tensor

    def __init__(self, model: nn.Module, score: str, threshold: Any) -> None:
        super().__init__()
        self.model = model
        self.score = check_score(score)
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=torch.float64).clone())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Classify images (B, channels, H, W) float32.

        Returns the predicted class (B,) int64, confidence (B,) float64, and whether the prediction is accepted (B,)
        bool.
        """
        return self.decide(images)[:3]

    def decide(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results of ``forward``, and the logits (B, C), float32 where the network is of half precision."""
        half = any(weight.dtype == torch.float16 for weight in self.model.parameters())
        outputs = self.model(images.half() if half else images)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        logits = logits.float() if logits.dtype == torch.float16 else logits
        prediction, confidence = logits.argmax(1), SCORES[self.score](logits)
        return prediction, confidence, confidence > self._limits(prediction), logits

    def _limits(self, prediction: Tensor) -> Tensor:
        return self.threshold.index_select(0, prediction) if self.threshold.ndim else self.threshold


class _ForOnnx(SelectiveClassifier):
    """Classifier with the logits as fourth output and confidences of 33 bits.

    ONNX Runtime's float64 functions depend in the last bits on a row's place in the batch, which would split ties.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        prediction, confidence, _, logits = self.decide(images)
        high = confidence * (2.0**20 + 1)
        confidence = high - (high - confidence)  # Veltkamp's splitting
        return prediction, confidence, confidence > self._limits(prediction), logits


class TorchGraph:
    """Graph of ``torch.export``; raises ValueError if the model cannot be exported."""

    def __init__(self, classifier: SelectiveClassifier, example: Tensor) -> None:
        self._program = _program(classifier, example)
        self._module = self._program.module()

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes (B,) and confidences (B,) float64 of images on the CPU."""
        return self._module(images)[:2]

    def save(self, path: Path, threshold: float | Floats, about: Mapping[str, Any]) -> None:
        """Write the graph, its threshold and its metadata ``about``."""
        self._program.state_dict["threshold"].copy_(torch.as_tensor(threshold, dtype=torch.float64))
        with replacing(path) as temporary:
            torch.export.save(self._program, temporary, extra_files={JSON: json.dumps(about)})


class OnnxGraph:
    """ONNX graph in ONNX Runtime, with the logits as a fourth output; methods and errors as of ``TorchGraph``."""

    def __init__(self, classifier: SelectiveClassifier, example: Tensor) -> None:
        program = _program(_ForOnnx(classifier.model, classifier.score, classifier.threshold), example)
        names = ["prediction", "confidence", "accepted", "logits"]
        try:
            # Constants go through float32, where the cosine's limit of 2^500 is infinite; float32 logits are below.
            with np.errstate(over="ignore"):
                exported = torch.onnx.export(
                    program, dynamo=True, input_names=["images"], output_names=names, verbose=False, optimize=True
                )
        except Exception as problem:  # of many types
            raise ValueError(f"torch.onnx.export cannot take the model ({one_line(problem)})") from problem
        assert exported is not None
        self._proto = exported.model_proto
        self._session = onnx_session(self._proto.SerializeToString())

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        prediction, confidence = self._session.run(["prediction", "confidence"], {"images": images.numpy()})
        return torch.from_numpy(prediction), torch.from_numpy(confidence)

    def save(self, path: Path, threshold: float | Floats, about: Mapping[str, Any]) -> None:
        import onnx

        stored = next(t for t in self._proto.graph.initializer if t.name == "threshold")
        stored.CopyFrom(onnx.numpy_helper.from_array(np.array(threshold), "threshold"))
        onnx.helper.set_model_props(self._proto, {name: json.dumps(value) for name, value in about.items()})
        with replacing(path) as temporary:
            temporary.write_bytes(self._proto.SerializeToString())


def check_onnx(*packages: str) -> None:
    """Raise ValueError if packages for ONNX are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {' and '.join(missing)}; install them with pip install 'tal-fast[export]'")


def onnx_session(model: str | bytes) -> Any:
    """Session of ONNX Runtime on the CPU, with PyTorch's number of threads, for a file or its bytes."""
    check_onnx("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _program(classifier: SelectiveClassifier, images: Tensor) -> torch.export.ExportedProgram:
    classifier.eval().requires_grad_(False)
    try:
        return torch.export.export(classifier, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as problem:  # of many types, depending on the model
        raise ValueError(f"torch.export cannot take the model ({one_line(problem)})") from problem


def export_run(
    run_dir: str | Path,
    folder: str | Path,
    *,
    format: Literal["torch-export", "onnx"],
    precision: Literal["fp32", "fp16"] = "fp32",
    score: str | None = None,
    checkpoint: Literal["best", "last"] = "best",
    batch_size: int = 256,
    device: str = "cpu",
    state: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a run's model with a threshold chosen on its validation images; returns ``threshold.json``.

    Args:
        run_dir: folder of a run of ``python -m tal_fast.train``.
        folder: output folder of the graph and of ``threshold.json``, which is written last.
        format: key of ``GRAPHS``.
        precision: of the network's weights; images and logits are float32, confidences float64.
        score: name from ``tal_fast.scores.SCORES``, or ``auto``; the score of the run's method unless given.
        batch_size: of the passes over the images.
        device: of PyTorch's pass, where its outputs are not cached; the graph runs on the CPU.
        state: write the classifier's state dict too, also where the model cannot be exported.
        options: ``risk``, ``confidence``, ``share``, ``seed`` and ``selection`` of ``calibrate``; ``per_class``;
            ``ood``, an OOD set of the run or NAME=WHERE, of which at most the share ``risk`` is accepted then. None
            accepts every prediction.

    Raises:
        NoThreshold: no threshold qualifies; nothing is written.
        ValueError: no run, checkpoint or data there, an unknown score, numbers out of range, a model that cannot be
            exported, or a graph that decides otherwise than PyTorch.
    """
    folder = Path(folder)
    check_writable(folder)
    if format == "onnx":
        check_onnx("onnx", "onnxscript", "onnxruntime")
    run = load_run(run_dir, checkpoint=checkpoint, device=device)
    passes = PassOptions(batch_size, ranks=Ranks(0, 1, torch.device(device)))
    inference = run.inference(Path(run_dir) / CACHE / run.checkpoint.stem, passes)
    outputs = inference.store("val").load()
    prediction: Ints = outputs.logits.argmax(1).astype(np.int64)
    options = None if options is None else {**DEFAULTS, **options}
    score, selection = select_score(score or run.score, outputs, options)
    confidence: Floats = SCORES[score](outputs.logits)
    about: dict[str, Any] = {
        "score": score, **selection, "run": str(run_dir), "checkpoint": run.checkpoint.stem, "epoch": run.epoch,
        "weights_sha256": weights_hash(run.model), "class_names": list(run.class_names),
        **asdict(Preprocessing.of(run.config.data, run.image_size, run.loader)),
    }  # fmt: skip
    by_class = options is not None and options.pop("per_class", False)
    everything = torch.full((len(run.class_names),) if by_class else (), -math.inf)
    classifier = SelectiveClassifier(run.model.cpu(), score, everything)
    graph: TorchGraph | OnnxGraph | None = None
    problem = None
    try:
        if precision == "fp16":
            run.model.half()
        example = torch.zeros(2, run.config.data.channels, run.image_size, run.image_size)
        graph = (OnnxGraph if format == "onnx" else TorchGraph)(classifier, example)
    except ValueError as error:
        if not state:
            raise
        problem = ValueError(f"{error}; {folder / STATE} holds its weights and the threshold")
    chosen_on = (prediction, confidence) if graph is None else graph_outputs(graph, run.data, batch_size)
    if by_class and options is not None:
        options |= {"predictions": chosen_on[0], "classes": len(run.class_names)}
    if options is not None and (ood := options.get("ood")) is not None:
        about["ood_set"], images = ood, _ood_images(run.data, ood)
        options["ood"] = (
            SCORES[score](inference.store(f"ood-{ood}", images).load().logits)
            if graph is None
            else graph_outputs(graph, run.data, batch_size, images)[1]
        )
    correct = chosen_on[0] == outputs.labels
    threshold: float | Floats = -math.inf
    values: dict[str, Any] = {
        "format": FORMAT, "threshold": None, "risk": None, "confidence": None, "samples": len(correct),
        "accepted": len(correct), "errors": int((~correct).sum()), "coverage": 1.0,
    }  # fmt: skip
    if options is not None:
        threshold, values = choose(score, chosen_on[1], outputs, correct, options)
    about = values | about
    if graph is not None:
        about["export"] = {"format": format, "precision": precision, "file": GRAPHS[format]}
        about["agreement"] = agreement(*chosen_on, prediction, confidence, threshold, TOLERANCE[precision])
    names = ("torch", "onnx", "onnxruntime") if format == "onnx" else ("torch",)
    about["versions"] = {"tal_fast": tal_fast.__version__, **{name: version_of(name) for name in names}}
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, f"another calibration writes to {folder}; waiting for it"):
        for name in (JSON, STATE, *GRAPHS.values()):  # they may be of other weights
            (folder / name).unlink(missing_ok=True)
        if state:
            classifier.threshold.copy_(torch.as_tensor(threshold, dtype=torch.float64))
            with replacing(folder / STATE) as temporary:
                torch.save(classifier.state_dict(), temporary)
        if graph is not None:
            graph.save(folder / GRAPHS[format], threshold, about)
        files = [folder / name for name in (STATE, GRAPHS[format]) if (folder / name).exists()]
        about["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        write_about(about, folder)
    if problem is not None:
        raise problem
    return about


def check_score(name: str) -> str:
    """Name in ``SCORES`` of a score; raises ValueError if there is none."""
    plain = name.replace("-", "_")
    if is_own_score(name):
        raise ValueError(f"{name} is Python code, which a graph cannot hold; choose its threshold with calibrate --npz")
    if plain not in SCORES:
        raise ValueError(f"unknown score {name!r}; choose a score of logits: {', '.join(SCORES)}")
    return plain


def read_about(path: str | Path) -> dict[str, Any]:
    """Content of a ``threshold.json``; raises ValueError if the file is missing or no such file."""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}); calibrate again") from None
    if not isinstance(about, dict) or about.get("format") not in (FORMAT, BY_CLASS) or "threshold" not in about:
        raise ValueError(f"{path} is no threshold.json of format {FORMAT} or {BY_CLASS}; calibrate again")
    return about


def write_about(about: Mapping[str, Any], folder: Path) -> None:
    """Write ``threshold.json``."""
    write_text(folder / JSON, json.dumps(about, indent=2, allow_nan=False) + "\n")


def graph_outputs(
    graph: TorchGraph | OnnxGraph, data: DataBundle, batch_size: int, images: Split | None = None
) -> tuple[Ints, Floats]:
    """Predicted classes and confidences of the validation images, or of others, in their order.

    Raises ValueError if a confidence is not finite.
    """
    from tqdm import tqdm

    samples = len(data.split("val") if images is None else images)
    prediction, confidence = np.zeros(samples, np.int64), np.zeros(samples)
    with (
        closing(data.loader("val" if images is None else images, batch_size=batch_size)) as loader,
        torch.inference_mode(),
    ):
        for batch, _, indices in tqdm(loader, "exported", leave=False, disable=None):
            prediction[indices], confidence[indices] = (values.numpy() for values in graph(batch))
    if not np.isfinite(confidence).all():
        raise ValueError(
            f"{int((~np.isfinite(confidence)).sum())} of {samples} confidences of the exported graph are not finite; "
            "export with --precision fp32"
        )
    return prediction, confidence


def agreement(
    prediction: Ints, confidence: Floats, reference_class: Ints, reference: Floats, threshold: Any, tolerance: float
) -> dict[str, Any]:
    """Comparison of a graph's decisions with PyTorch's; the entry ``agreement`` of ``threshold.json``.

    Returns:
        ``images``; ``bound``, within which of the threshold decisions may differ; ``inside``, the images within it;
        ``decisions_differ`` among these; ``classes_differ`` and ``largest_difference`` of the scores over all images.

    Raises:
        ValueError: the decision on an image differs outside the bound, and not by another class's threshold.
    """
    bound = tolerance * max(1.0, float(np.abs(reference).max()))
    by_class = np.ndim(threshold) > 0
    limit, own = (np.asarray(threshold)[of] if by_class else threshold for of in (reference_class, prediction))
    inside = (np.abs(reference - limit) <= bound) | (by_class & (prediction != reference_class))
    differ = (confidence > own) != (reference > limit)
    largest = float(np.abs(confidence - reference).max())
    if (differ & ~inside).any():
        raise ValueError(
            f"the exported graph decides otherwise than PyTorch for {int((differ & ~inside).sum())} of {len(differ)} "
            f"images whose score is further than {bound:.2g} from the threshold; scores differ by up to "
            f"{largest:.2g}: export with --precision fp32"
        )
    return {
        "images": len(differ), "bound": bound, "inside": int(inside.sum()), "decisions_differ": int(differ.sum()),
        "classes_differ": int((prediction != reference_class).sum()), "largest_difference": largest,
    }  # fmt: skip


def choose(
    score: str, confidence: Any, outputs: Outputs, correct: Any, options: Mapping[str, Any]
) -> tuple[float | Floats, dict[str, Any]]:
    """Result of ``calibrate``; a refusal of a risk has a table of what every score of the outputs achieves."""
    try:
        return calibrate(confidence, correct, **options)
    except NoThreshold as problem:
        refusal = NoThreshold(f"with {score}, {problem}")
        if options.get("ood") is not None or options.get("predictions") is not None:
            raise refusal from None
        raise with_table(refusal, logit_scores(outputs.logits), outputs.correct, **options) from None


def select_score(score: str, outputs: Outputs, options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Name in ``SCORES``, and the entries of ``threshold.json`` for ``auto``, which sets ``selection`` in options."""
    if score != "auto":
        return check_score(score), {}
    if options is None or options.get("ood") is not None:
        raise ValueError("--score auto goes by the coverage at a bounded risk; give --risk alone, or name a score")
    _, pick, _ = parts(len(outputs.labels), options["share"], options["seed"], selection=True)
    options["selection"] = True
    scores = logit_scores(outputs.logits[pick])
    rows = score_table(scores, outputs.correct[pick], risk=options["risk"], confidence=options["confidence"])
    return rows[0]["score"], {"score_selection": {"samples": int(pick.size), "scores": rows}}


def _ood_images(data: DataBundle, text: str) -> Split:
    """Images of an OOD set: one of the data set's by name, or NAME=WHERE."""
    name, equals, spec = text.partition("=")
    if equals:
        with set_named(name):
            return ood_set(spec, data.image_size, data.channels)
    if name not in data.ood_names:
        known = ", ".join(data.ood_names) or "none"
        raise ValueError(f"the run has no OOD set {name!r} (it has: {known}); give --ood NAME=WHERE")
    return data.split(name)
