#!/usr/bin/env bash
# Make the files in this folder with version 0.1.0: make.sh CHECKOUT, a working tree of commit 05a3d9d that can be
# imported (tal_fast/kernels linked to ../kernels, extension built). PYTHON names the interpreter.
set -euo pipefail
old=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
python=$(command -v "${PYTHON:-python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$old OMP_NUM_THREADS=1 TAL_FAST_CACHE=$work/cache
cp "$here/experiment.yaml" "$work"
cd "$work" # outputs are relative paths, so that no file names a machine's folders
small=(
    --data.dataset digits --data.loader torch --data.workers 0 --data.image-size 8 --data.channels 1
    --data.crop-fraction 1 --data.crop-area "[0.6, 1]" --data.flip false --data.train-limit 200
    --model.name cifar_resnet8 --model.width 4 --batch-size 16 --device cpu --threads 1 --logger none --progress none
)

"$python" -m tal_fast.train "${small[@]}" --output run --epochs 3 --batch-size 8 --seed 3 --optim.lr 0.05 \
    --method.name tal --method.variant released --method.queue-size 120 --method.t-min 5 --method.t-max 60 \
    --method.t-wrong null --method.confidence-threshold 0.2 --method.queue-scope global --method.backend native \
    --method.label-smoothing 0.05 --method.warmup-epochs 1
"$python" -m tal_fast.evaluate --run run --bootstrap 50 --ood noise=gaussian:150 --shift contrast=contrast:4
"$python" -m tal_fast.calibrate --run run --risk 0.3
"$python" - <<'PYTHON'
import numpy as np
from tal_fast.inference import CACHE, collect_outputs
from tal_fast.runs import load_run

run = load_run("run")
val, photos = (collect_outputs(run, split, f"run/{CACHE}/best") for split in ("val", "photos"))
np.savez("outputs.npz", logits=val.logits, labels=val.labels.astype(np.uint8), ood_photos_logits=photos.logits)
PYTHON

# interrupted STEP OPTIONS...: train until SIGTERM arrives during this step of the run.
interrupted() {
    "$python" - "$@" <<'PYTHON' || test $? = 75
import os, signal, sys
from tal_fast import train
from tal_fast.trainer import Trainer

original, steps = Trainer._train_step, [0]

def train_step(self, *arguments):
    original(self, *arguments)
    steps[0] += 1
    if steps[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)

Trainer._train_step = train_step
train.main(sys.argv[2:])
PYTHON
}
mkdir mid-epoch
interrupted 31 "${small[@]}" --output mid-epoch/fmfp-tal --epochs 4 --seed 4 --optim.lr 0.1 --method.name fmfp-tal \
    --method.queue-size 90 --method.t-min 8 --method.t-max 70 --method.queue-scope global --method.warmup-epochs 1 \
    --method.options.swa-from 0.3 --method.options.rho 0.1
interrupted 17 "${small[@]}" --output mid-epoch/ce-ema --epochs 2 --seed 5 --optim.name adamw --optim.lr 0.01 \
    --optim.ema-decay 0.9 --optim.accumulate 2 --optim.clip-norm 1 --method.name ce --method.queue-size 30
interrupted 31 "${small[@]}" --output mid-epoch/crl --epochs 3 --seed 6 --optim.lr 0.05 --method.name crl \
    --method.options.weight 0.5

"$python" -m tal_fast.experiment experiment.yaml --output experiment --jobs 1

"$python" "$here/describe.py" > expected.json

# What is large, only a picture or about the machine stays behind: caches, pages, the exported program, logs, locks.
keep=(
    expected.json outputs.npz run/{config.yaml,metrics.csv,report.json,samples.npz} run/checkpoints/{best,last}.pt
    run/calibrated/{threshold.json,selective.pt} mid-epoch/*/{config.yaml,metrics.csv} mid-epoch/*/checkpoints/last.pt
    experiment/results.json experiment/runs/*/{asked.yaml,config.yaml,job.json,metrics.csv,report.json,samples.npz}
)
if grep -rlE "$work|$old|$HOME/" "${keep[@]}"; then
    echo "these files name a path of this machine" >&2
    exit 1
fi
rm -rf "$here"/{run,mid-epoch,experiment}
cp --parents "${keep[@]}" "$here"
