"""The commands of the guide to an abstaining service run from end to end on small photos."""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
NETWORK = "mobilenetv3_small_050"


def write_photos(folder: Path, count: int) -> None:
    """Small photos of three classes, which differ in their colours."""
    random = np.random.default_rng(0)
    for name, colour in {"cat": (200, 60, 60), "dog": (60, 200, 60), "emu": (60, 60, 200)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            coarse = np.clip(random.normal(colour, 40, (6, 7, 3)), 0, 255).astype(np.uint8)
            side = random.integers(40, 80, 2)
            Image.fromarray(coarse).resize((int(side[0]), int(side[1]))).save(folder / name / f"{i}.jpg")


def answer_of(url: str, photo: Path, server: subprocess.Popen[bytes]) -> dict[str, object]:
    for _ in range(200):
        assert server.poll() is None
        try:
            return httpx.post(url, content=photo.read_bytes(), trust_env=False).json()
        except httpx.ConnectError:
            time.sleep(0.1)
    raise AssertionError("the service does not start")


@pytest.mark.timeout(300)
def test_the_commands_of_the_guide_lead_to_a_service(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "guides" / "abstaining-service.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_photos(tmp_path / "photos", 180)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert f"timm/{NETWORK} --model.weights pretrained" in blocks[0]
    torch.manual_seed(0)
    weights = timm.create_model(NETWORK).state_dict()
    weights["conv_head.weight"] *= 30  # random weights' features are 0.001, far below those of pretrained ones
    torch.save(weights, tmp_path / "weights.pt")
    blocks = [block.replace("weights pretrained", "weights weights.pt").replace("8000", str(port)) for block in blocks]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for block in blocks[:3]:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, block + done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 540
    assert sum(row["class"] == Path(row["path"]).parent.name for row in rows) > 480
    with subprocess.Popen(["bash", "-c", f"exec env {blocks[3]}"], cwd=tmp_path, env=environment) as server:
        try:
            photo = tmp_path / "photos" / "cat" / "1.jpg"
            answer = answer_of(f"http://127.0.0.1:{port}/predict", photo, server)
            row = next(row for row in rows if row["path"] == "photos/cat/1.jpg")
            assert (answer["class"], str(answer["accepted"])) == (row["class"], row["accepted"])
            if shutil.which("curl"):
                done = subprocess.run(["bash", "-c", blocks[4]], cwd=tmp_path, env=environment, capture_output=True)
                assert b'"accepted":' in done.stdout
        finally:
            server.terminate()
            server.wait(20)
