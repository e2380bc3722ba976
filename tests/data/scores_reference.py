"""Write ``scores_cases.json``: confidence scores by their authors' code.

    git clone https://github.com/lfpc/FixSelectiveClassification fix   # edc274e: MaxLogit-pNorm, p and MSP; margin
    git clone https://github.com/XixiLiu95/GEN gen                     # 1e792b5: GEN
    python tests/data/scores_reference.py fix gen

CTM has no code that can be imported; its values are the maximum over the classes of ``F.cosine_similarity`` to the
class means, as in its paper (arXiv 2306.14920).
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def function_of(path: Path, name: str) -> object:
    """A function of a script that cannot be imported without its other dependencies."""
    tree = ast.parse(path.read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict[str, object] = {"np": np}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), space)
    return space[name]


def main(fix: str, gen: str) -> None:
    """Compute the cases and write the file."""
    sys.path.insert(0, fix)
    import post_hoc
    from utils.measures import margin_logits

    generalized_entropy = function_of(Path(gen) / "benchmark.py", "generalized_entropy")
    rng, cases = np.random.default_rng(0), []
    for rows, classes, scale in ((40, 5, 3.0), (6, 120, 2.0)):
        direction = scale * rng.normal(size=(rows, classes))
        p = torch.tensor(direction).softmax(1).numpy()
        labels = (rng.random((rows, 1)) > p.cumsum(1)).sum(1).clip(max=classes - 1)
        z = (direction * rng.lognormal(sigma=1, size=(rows, 1))).round(3)  # a length that says nothing
        logits, risk = torch.tensor(z), torch.tensor((z.argmax(1) != labels).astype(float))
        values = {f"pnorm {p}": post_hoc.MaxLogit_pNorm(logits, p) for p in range(10)}
        values |= {"margin": margin_logits(logits)}
        values |= {"gen": torch.tensor(generalized_entropy(logits.softmax(1).numpy(), 0.1, 100))}  # type: ignore[operator]
        train = torch.tensor(rng.normal(size=(20, 4)).round(3)) + 1
        train_labels, features = torch.arange(20) % 4, torch.tensor(rng.normal(size=(rows, 4)).round(3))
        means = torch.stack([train[train_labels == c].mean(0) for c in range(4)])
        values |= {"ctm": F.cosine_similarity(features[:, None], means, dim=2).amax(1)}
        chosen = post_hoc.optimize.p(logits, risk)
        cases.append(
            {
                "logits": z.tolist(), "labels": labels.tolist(), "features": features.tolist(),
                "train_features": train.tolist(), "train_labels": train_labels.tolist(),
                "scores": {name: v.tolist() for name, v in values.items()},
                "chosen": "msp" if chosen == "MSP" else f"p = {int(chosen)}",
            }
        )  # fmt: skip
    path = Path(__file__).with_name("scores_cases.json")
    path.write_text("\n".join(json.dumps(case) for case in cases) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
