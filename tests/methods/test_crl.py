"""CRL: the ranking loss against its definition, and its counts of correct predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tests.helpers.training import method as make_method


def test_crl_orders_confidences_by_how_often_samples_were_correct() -> None:
    method = make_method(MethodConfig("crl", options={"weight": 0.7}), images=20)
    features = torch.rand(6, 3)
    times_correct = np.zeros(20)
    for epoch in range(3):
        method.start_epoch(epoch)
        correct_now: dict[int, bool] = {}
        for first in range(0, 18, 6):
            indices = torch.tensor([(7 * i) % 19 for i in range(first, first + 6)])
            logits, labels = 2 * torch.randn(6, 4), torch.randint(4, (6,))
            loss = method(logits, features, labels, indices).loss
            smallest = times_correct.min()
            correctness = (times_correct - smallest) / max(1, max(1, epoch) - smallest)
            kappa = logits.softmax(1).amax(1).double().numpy()
            ranking = 0.0
            for row in range(6):
                after = (row + 1) % 6
                margin = correctness[indices[row]] - correctness[indices[after]]
                ranking += max(0.0, -np.sign(margin) * (kappa[row] - kappa[after]) + abs(margin)) / 6
            assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)) + 0.7 * ranking, rel=1e-5)
            correct_now |= dict(zip(indices.tolist(), (logits.argmax(1) == labels).tolist(), strict=True))
        for image, correct in correct_now.items():
            times_correct[image] += correct
        method.finish_epoch()
        np.testing.assert_array_equal(method.get_extra_state()["times_right"].numpy(), times_correct)


def test_crl_leaves_out_rows_without_an_image() -> None:
    method = make_method(MethodConfig("crl"), images=4)
    method.set_extra_state({"times_right": torch.tensor([3.0, 0, 2, 1]), "right_now": torch.zeros(4), "epochs": 3})
    method.start_epoch(3)
    logits, features, labels = torch.randn(4, 5), torch.rand(4, 3), torch.tensor([0, IGNORED_LABEL, 2, 3])
    loss = method(logits, features, labels, torch.arange(4)).loss
    kappa = logits.softmax(1).amax(1)
    pairs = [(2, 3, 1 / 3), (3, 0, -2 / 3)]  # (0, 1) and (1, 2) have a row without an image
    ranking = torch.stack([torch.relu(abs(d) - np.sign(d) * (kappa[i] - kappa[j])) for i, j, d in pairs]).mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels) + ranking)
    assert method.get_extra_state()["right_now"][1] == 0


def test_crl_counts_from_0_with_other_images() -> None:
    method = make_method(MethodConfig("crl"), images=40)
    state = method.state_dict()
    for images in (41, 40):  # another number, and other images of the same number
        state["_extra_state"] |= {"times_right": torch.ones(images), "right_now": torch.ones(images), "epochs": 2}
        method.load_state_dict(state)
        with pytest.warns(UserWarning, match="CRL's counts are of other training images: counting starts from 0"):
            method.resumed(epoch_start=False, same_images=False)
        extra = method.get_extra_state()
        assert extra["epochs"] == -1  # the end of the epoch, of which nothing was seen, is not one
        assert not extra["times_right"].any()
        assert not extra["right_now"].any()
        method.finish_epoch()
        assert method.get_extra_state()["epochs"] == 0


@pytest.mark.parametrize("epoch_start", [False, True])
def test_crl_counts_the_images_of_an_epoch_that_starts_again_once(epoch_start: bool) -> None:
    method = make_method(MethodConfig("crl"), images=3)
    method.load_state_dict({"_extra_state": {"times_right": torch.ones(3), "right_now": torch.ones(3), "epochs": 1}})
    method.resumed(epoch_start, same_images=True)
    extra = method.get_extra_state()
    assert (extra["times_right"].tolist(), extra["right_now"].tolist()) == ([1, 1, 1], [float(not epoch_start)] * 3)
