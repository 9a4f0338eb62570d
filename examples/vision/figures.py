"""What the attention of a Vision Transformer looks at, drawn over the picture, and how M and S change with depth."""

from pathlib import Path
from typing import Dict, List, Sequence

import matplotlib

matplotlib.use("Agg")

import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from multimax_vit import MultiMaxVisionTransformer, recording  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from multimax_fairseq.analysis import attention_rollout  # noqa: E402

# of Okabe and Ito, which colour-blind readers tell apart
COLOURS = ("#595959", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# one hue, from clear to nearly opaque: the picture stays to be seen, and brightness is the picture's
OVER_PICTURE = LinearSegmentedColormap.from_list("over a picture", [(0.84, 0.37, 0.0, 0.0), (0.84, 0.37, 0.0, 0.9)])


def rollout_maps(model: MultiMaxVisionTransformer, pictures: Tensor) -> Tensor:
    """How much of what is classified comes from each patch, by attention rollout.

    Args:
        pictures: (count, channels, height, width).

    Returns:
        (count, rows, columns) of patches; each map sums to 1, or to what a class token leaves.

    Source: Abnar & Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020.
    """
    attentions: List[Tensor] = []

    def keep(block: int, scores: Tensor, probabilities: Tensor) -> None:
        attentions.append(probabilities.mean(1))

    with torch.no_grad(), recording(model, keep):
        model(pictures)
    tokens = model.num_prefix_tokens
    rollout = attention_rollout(attentions)[:, :, tokens:]  # (count, outputs, patches)
    # what is classified is the mean of all patches, or the class token
    patches = rollout[:, tokens:].mean(1) if model.global_pool == "avg" else rollout[:, 0]
    return patches.unflatten(1, model.patch_embed.grid_size)


def draw_rollouts(pictures: Tensor, maps: Dict[str, Tensor], path: Path) -> None:
    """A row a model, a column a picture, with the model's map over it; the pictures alone are the first row.

    All maps have one scale, in multiples of an even share (1 / number of patches).

    Args:
        pictures: (count, height, width), or (count, height, width, 3) with colours from 0 to 1.
        maps: name of the model → (count, rows, columns).
    """
    height, width = pictures.shape[1:3]
    shares = {name: part * part[0].numel() for name, part in maps.items()}
    low, high = torch.stack(list(shares.values())).aminmax()
    count = len(pictures)
    size = (1.5 * count + 1.2, 1.5 * (len(maps) + 1) + 0.3)
    figure, axes = pyplot.subplots(len(maps) + 1, count, figsize=size, layout="constrained", squeeze=False)
    for row, (name, part) in enumerate([("picture", None), *shares.items()]):
        axes[row, 0].set_ylabel(name)
        for column, picture in enumerate(pictures):
            panel = axes[row, column]
            panel.imshow(picture, cmap="gray_r")
            panel.set_xticks([])
            panel.set_yticks([])
            if part is not None:
                drawn = F.interpolate(part[column][None, None], size=(height, width), mode="nearest")[0, 0]
                image = panel.imshow(drawn, cmap=OVER_PICTURE, vmin=low, vmax=high)
    figure.colorbar(image, ax=axes[1:], label="share of a patch × number of patches", shrink=0.8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_metrics(metrics: Dict[str, Sequence[Sequence[Sequence[float]]]], path: Path) -> None:
    """Multi-modality and sparsity of each block: the mean over seeds, and the range of them.

    Args:
        metrics: name of the mapping → M and S → a run each → a number a block.
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, both), colour in zip(metrics.items(), COLOURS):
        for panel, values in zip(panels, both):
            runs = torch.tensor(values)  # (runs, blocks)
            blocks = range(1, runs.size(1) + 1)
            panel.plot(blocks, runs.mean(0), marker="o", color=colour, label=name)
            panel.fill_between(blocks, runs.amin(0), runs.amax(0), color=colour, alpha=0.15, linewidth=0)
            panel.set_xticks(blocks)
    for panel, title in zip(panels, ("multi-modality M", "sparsity S")):
        panel.set_title(title)
        panel.set_xlabel("block")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
