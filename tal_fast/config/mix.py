"""Options of mixed images: section ``mix`` of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from tal_fast.config.typed import check_at_least, check_positive, check_range


@dataclass
class MixConfig:
    """Mixing of the images of a batch with one another.

    Attributes:
        mixup: parameter α of mixup, whose images are λ x + (1 - λ) x' with one λ ~ Beta(α, α) a batch; 0 for none.
        cutmix: parameter α of CutMix, which replaces a rectangle of the share 1 - λ by another image; 0 for none.
        switch_prob: share of the batches that CutMix takes where mixup is on too.
        weight: weight of the mixed images' loss beside that of the clean ones, as in RegMixup; a step then has twice
            the images. By default the mixed images take the place of the clean ones.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    weight: float | None = None

    @property
    def on(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("mixup", "cutmix"):
            check_at_least(f"mix.{name}", getattr(self, name), 0)
        check_range("mix.switch_prob", self.switch_prob, "[0, 1]")
        check_positive("mix.weight", self.weight, ", or null for mixed images in place of the clean ones")
        if self.weight is not None and not self.on:
            raise ValueError(f"mix.weight is {self.weight} but no images are mixed; set mix.mixup or mix.cutmix")

    def summary(self, images: int) -> str:
        """Kind and cost of mixing, for ``images`` images a step."""
        kinds = (("mixup", self.mixup), ("CutMix", self.cutmix))
        text = " or ".join(f"{name} (alpha {alpha:g})" for name, alpha in kinds if alpha)
        if self.weight is None:
            return f"{text} in place of the images"
        return f"{text} beside the images, weight {self.weight:g}: {2 * images} images a step, not {images}"
