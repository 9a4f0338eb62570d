"""A walk through multimax_fairseq.analysis from Python: one sentence, its attention, its numbers, a figure.

    python examples/analysis/look.py CHECKPOINT DATA_BIN [--sentence 0] [--out attention.png]

Each "# %%" begins a cell for editors that run such files as notebooks.
"""

# %% What it is about
import argparse
import logging

import torch
from fairseq import checkpoint_utils
from matplotlib import pyplot

from multimax_fairseq import analysis

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
parser.add_argument("data", help="the folder that fairseq-preprocess made")
parser.add_argument("--split", default="valid")
parser.add_argument("--sentence", type=int, default=0)
parser.add_argument("--out", default="attention.png")
args = parser.parse_args()
logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG

# %% A model and a batch, as fairseq loads them
here = {"data": args.data}
(model,), _, task = checkpoint_utils.load_model_ensemble_and_task([args.checkpoint], arg_overrides=here)
task.load_dataset(args.split)
dataset = task.dataset(args.split)
sample = dataset.collater([dataset[args.sentence]])

# %% Everything that its attention does
collected = analysis.collect(model, sample)
for attention in collected.attention:
    # (1, num_heads, tgt_len, src_len) each; −inf marks a score that is not there
    metrics = analysis.row_metrics(attention.scores, attention.probabilities)
    values = {name: rows.nanmean().item() for name, rows in metrics._asdict().items()}
    print(f"{attention.site:8} layer {attention.layer}:  M {values['multimodality']:.3f}  S {values['sparsity']:.3f}"
          f"  entropy {values['entropy']:.3f} nat  effective support {values['effective_support']:.2f} keys")

# %% How alike the tokens become
for output in collected.layers:
    print(f"{output.side:8} layer {output.layer}:  MAD {analysis.mean_average_distance(output.hidden).item():.3f}")

# %% All layers together
attentions = {site: [layer.probabilities for layer in collected.at(site)] for site in collected.masks}
if "cross" in attentions:
    rollout, _ = analysis.translation_rollout(attentions["decoder"], attentions["cross"], attentions["encoder"])
else:
    rollout = analysis.attention_rollout(next(iter(attentions.values())))

# %% One figure: the heads of the last layer, and the rollout
site = "cross" if "cross" in attentions else next(iter(attentions))
heads = attentions[site][-1][0]  # (num_heads, tgt_len, src_len)
tokens = [task.source_dictionary[token] for token in sample["net_input"]["src_tokens"][0].tolist()]
figure, panels = pyplot.subplots(1, len(heads) + 1, figsize=(2.6 * (len(heads) + 1), 3.2), layout="constrained")
for panel, matrix, title in zip(panels, torch.cat([heads, rollout]), [*range(1, len(heads) + 1), "rollout"]):
    panel.imshow(matrix, cmap="Blues", aspect="auto")
    panel.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=6)
    panel.set_title(f"head {title}" if title != "rollout" else title)
panels[0].set_ylabel("position")
figure.supxlabel(f"token that {site} attention looks at")
figure.savefig(args.out, dpi=150)
print(args.out)
