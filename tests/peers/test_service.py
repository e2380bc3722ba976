"""The example service, started as its users start it, answers as the classifier does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tal_fast.evaluation import export_command
from tal_fast.evaluation.classifier import Classifier
from tests.helpers.evaluation import make_run
from tests.helpers.images import make_folder, picture

APP = Path(__file__).parents[2] / "examples" / "service"


@pytest.mark.parametrize("channels", [3, 1])
def test_the_service_answers_as_the_classifier(channels: int, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data", val=23)
    options = {"dataset": "folder", "root": str(data), "image_size": 24, "channels": channels, "loader": "torch"}
    options["exif_rotation"] = channels == 3
    run = make_run(tmp_path / "run", data=options, classes=("cat", "dog", "emu"))
    # About a third of the untrained network's predictions are right.
    risk = ["--risk", "0.85", "--confidence", "0.5", "--calibration-share", "1", "--device", "cpu"]
    assert export_command.main(["--run", str(run), "--output", str(tmp_path / "model"), *risk]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(APP), "app:app", "--port", str(port)]
    environment = {**os.environ, "MODEL": str(tmp_path / "model" / "selective.onnx"), "MAX_BYTES": "100000"}
    with subprocess.Popen(command, env=environment) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                for _ in range(200):
                    assert server.poll() is None
                    try:
                        assert client.get("/health").json()["risk"] == 0.85
                        break
                    except httpx.ConnectError:
                        time.sleep(0.1)
                classifier = Classifier(tmp_path / "model")
                paths = sorted((data / "val").rglob("*.*"))
                for i, size in enumerate([(40, 31), (25, 77), (24, 24)]):
                    paths.append(tmp_path / f"{i}.png")
                    picture(*size, i).save(paths[-1])
                for path, want in zip(paths, classifier(paths), strict=True):
                    answer = client.post("/predict", content=path.read_bytes()).json()
                    assert (answer["class"], answer["accepted"]) == (want.class_name, want.accepted), path
                    assert answer["confidence"] == pytest.approx(want.confidence, abs=1e-5)
                Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(tmp_path / "16 bits.png")
                for content in (b"no image", (tmp_path / "16 bits.png").read_bytes()):
                    assert client.post("/predict", content=content).status_code == 415
                assert client.post("/predict", content=bytes(200_000)).status_code == 413
        finally:
            server.terminate()
            server.wait(20)
