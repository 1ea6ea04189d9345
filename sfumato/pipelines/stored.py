"""A model that draws by diffusion as the file that it can be loaded from again: a pack of ours, or one that other programs read too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfumato.convert.diffusers import scheduler_json
from sfumato.convert.stable import TUNED_KIND, Checkpoint, single_tensors
from sfumato.core.config import to_json
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.stable_diffusion import StableDiffusion


def checkpoint_of(m: StableDiffusion) -> Checkpoint:
    return Checkpoint(m.denoiser, m.codec, m.ears, m.scheduler, m.meta["version"], m.size, quiet=m.quiet)  # type: ignore[arg-type]


def stored(model: LatentDiffusion) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata; of a checkpoint of Stable Diffusion by the names of its authors."""
    if isinstance(model, StableDiffusion):
        said = {"unet": to_json(model.denoiser.config), "scheduler": scheduler_json(model.scheduler), "size": model.size, "quiet": model.quiet}
        return single_tensors(checkpoint_of(model)), {"kind": TUNED_KIND} | said
    parts = {"codec": model.codec, "text": model.text, "denoiser": model.denoiser}
    tensors = {f"{name}.{k}": v for name, n in parts.items() if n is not None for k, v in n.state_dict().items()}
    return tensors, {k: v for k, v in model.meta.items() if k not in ("hash", "format", "images", "with")}
