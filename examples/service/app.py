"""Service that classifies photos and abstains: FastAPI and ONNX Runtime, without PyTorch and without tal-fast.

tal-fast export --run runs/tal --format onnx --risk 0.05 --output model
pip install fastapi uvicorn onnxruntime pillow numpy
MODEL=model/selective.onnx uvicorn --app-dir examples/service app:app
curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
"""

import io
import json
import logging
import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool

MAX_BYTES = int(os.environ.get("MAX_BYTES", 20_000_000))
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses images of more than twice as many

session = onnxruntime.InferenceSession(os.environ["MODEL"], providers=["CPUExecutionProvider"])
about = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
if about.get("risk") is None:
    logging.getLogger("uvicorn.error").warning("the model has no threshold: every prediction is accepted")
app = FastAPI(title="Classifier that abstains")


def preprocess(data: bytes) -> np.ndarray:
    """Central square, resized and normalized: the preprocessing that the model's metadata describe. (1, C, S, S)."""
    size, channels = about["image_size"], about["channels"]
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith(("I", "F", "LAB", "HSV")):
        raise ValueError(f"pixels of mode {image.mode}")  # Pillow would cut 16 bits off at 255
    if about["exif_rotation"]:
        image = ImageOps.exif_transpose(image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = max(1, round(min(image.size) * about["crop_fraction"]))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((size, size), Image.Resampling[about["interpolation"].upper()])
    pixels = np.asarray(image, np.float32).reshape(size, size, channels) / 255
    pixels = (pixels - np.array(about["mean"], np.float32)) / np.array(about["std"], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def classify(data: bytes) -> dict:
    try:
        images = preprocess(data)
    except Exception as error:  # damage can surface anywhere in a decoder
        raise HTTPException(415, f"the body is no image that can be read ({type(error).__name__})") from None
    prediction, confidence, accepted = session.run(["prediction", "confidence", "accepted"], {"images": images})
    return {
        "class": about["class_names"][int(prediction[0])],
        "confidence": float(confidence[0]),
        "accepted": bool(accepted[0]),  # False: hand the photo to a person
    }


@app.post("/predict")
async def predict(request: Request) -> dict:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the photo has more than {MAX_BYTES:,} bytes")
    return await run_in_threadpool(classify, bytes(body))


@app.get("/health")
def health() -> dict:
    return {name: about.get(name) for name in ("score", "threshold", "risk", "coverage", "weights_sha256")}
