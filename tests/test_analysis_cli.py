"""multimax-analyze on real checkpoints: its numbers against loops over single sentences, its files, its errors."""

import copy
import csv
import itertools
import json
import math
import re
import runpy
import shutil
import sys
from argparse import Namespace
from statistics import fmean
from xml.etree import ElementTree

import matplotlib
import pytest
import reference
import torch
from conftest import ROOT, call, parse, run, save_checkpoint
from fairseq import checkpoint_utils, tasks
from PIL import Image

from multimax_fairseq.analysis import ScoreHistogram, collect, figures, metrics, page
from multimax_fairseq.analysis.cli import main
from multimax_fairseq.analysis.measure import ILLUSTRATION, Measurement, common_reference, numbers_of_module
from multimax_fairseq.mappings import MAPPINGS, MultiMax

SENTENCES = 12
LSTM = ["--arch", "lstm", "--encoder-embed-dim", 8, "--decoder-embed-dim", 8, "--decoder-out-embed-dim", 8,
        "--encoder-hidden-size", 8, "--decoder-hidden-size", 8]  # its attention is no MultiheadAttention


@pytest.fixture(scope="module")
def checkpoints(build, tmp_path_factory):
    """Untrained, but with weights and modulators large enough that attention is not uniform."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {
        "stock": build("transformer"),
        "multimax": build("multimax_transformer"),
        "no-cross": build("multimax_transformer", "--cross-self-attention", "--no-cross-attention"),
        "lm": build("multimax_transformer_lm", "--output-mapping", "multimax"),
    }
    _, cfg = parse([models["stock"].cfg.task.data, *LSTM])
    models["lstm"] = Namespace(model=tasks.setup_task(cfg.task).build_model(cfg.model), cfg=cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in (pair for built in models.values() for pair in built.model.named_parameters()):
            if "k_proj.weight" in name:
                parameter.mul_(4)
            if "mapping" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.6 - 0.3)
    return {name: save_checkpoint(built, folder / name / "checkpoint_best.pt") for name, built in models.items()}


def analyze(checkpoints, data, out, *options):
    options = ["--cpu", "--no-progress-bar", "--max-sentences", 3, *options]
    main([*map(str, [*checkpoints, "--data", data, "--out", out, *options])])
    return out


@pytest.fixture(scope="module")
def report(checkpoints, corpus, tmp_path_factory):
    """A report of a stock model and one with MultiMax, on the first sentences of the validation set."""
    return analyze([checkpoints["stock"], checkpoints["multimax"]], corpus / "data-bin",
                   tmp_path_factory.mktemp("report") / "report", "--max-sentences", SENTENCES, "--show", 3,
                   "--alignments", corpus / "text" / "valid.align")  # fmt: skip


def read(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def document(report):
    return read(report)


@pytest.fixture(scope="module")
def results(document):
    return {label: model for label, (model,) in document["models"].items()}


def where(rows, /, **values):
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def collect_each(path, split, count):
    """Each sentence by itself, so without padding: what a report's numbers are computed from once more."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    task.load_dataset(split)
    dataset = task.dataset(split)
    return [collect(model, dataset.collater([dataset[index]])) for index in range(count)]


@pytest.fixture(scope="module")
def collected(checkpoints):
    return collect_each(checkpoints["multimax"], "valid", SENTENCES)


def check_numbers(numbers, rows):
    """A row of a table against the metrics of single sentences: (scores, probabilities), (queries, K), of each."""
    found = metrics.RowMetrics(*map(torch.cat, zip(*(metrics.row_metrics(*pair) for pair in rows))))
    assert numbers["rows"] == len(found.entropy)
    for name, values in found._asdict().items():
        assert numbers[name] == pytest.approx(values.nanmean().item(), abs=1e-4, rel=1e-4)
    for name in ("multimodality", "top_multimodality", "sparsity"):
        assert numbers[f"{name}_undefined"] == getattr(found, name).isnan().sum()
    s = numbers["common_reference"]
    common = torch.cat([metrics.row_metrics(*pair, reference=s).sparsity for pair in rows])
    assert numbers["common_sparsity"] == pytest.approx(common.nanmean().item(), abs=1e-4)


# ---------------------------------------------------------------------- numbers


def test_numbers_of_each_head_are_means_over_single_sentences(results, collected):
    heads = results["multimax"]["heads"]
    places = {(row["site"], row["layer"], row["head"]) for row in heads}
    assert places == {*itertools.product(("encoder", "decoder", "cross"), (0, 1), (0, 1))}
    for numbers in heads:
        head, attentions = numbers["head"], [one.at(numbers["site"])[numbers["layer"]] for one in collected]
        check_numbers(numbers, [(one.scores[0, head], one.probabilities[0, head]) for one in attentions])
        # a first target token sees one score, which lies on the threshold
        assert numbers["sparsity_undefined"] == (SENTENCES if numbers["site"] == "decoder" else 0)
    for site in results["multimax"]["sites"]:
        entropies = [row["entropy"] for row in where(heads, site=site["site"])]
        assert site["entropy"] == pytest.approx(fmean(entropies)) and site["heads"] == len(entropies) == 4


def test_models_of_a_report_share_one_s_a_site(results):
    """The geometric mean of their tails; a tail of 0, or of no irrelevant score, does not count."""
    for site in ("encoder", "decoder", "cross"):
        (stock,), (ours,) = (where(model["sites"], site=site) for model in results.values())
        assert stock["common_reference"] == pytest.approx(math.sqrt(stock["tail"] * ours["tail"]))
        assert stock["common_reference"] == ours["common_reference"]
    assert common_reference([0.01, 0.09, 0.0, None]) == pytest.approx(0.03)
    assert common_reference([0.0]) is None


def test_numbers_of_a_layer_are_means_over_single_sentences(results, collected):
    assert {(row["side"], row["layer"]) for row in results["multimax"]["layers"]} == {
        (side, layer) for side in ("encoder", "decoder") for layer in (0, 1, 2)
    }
    for row in results["multimax"]["layers"]:
        place = (row["side"], row["layer"])
        layers = [layer for sentence in collected for layer in sentence.layers if (layer.side, layer.layer) == place]
        distances = [reference.mean_average_distance(layer.hidden[0].tolist()) for layer in layers]
        assert row["mad"] == pytest.approx(fmean(distances), abs=1e-5)


def coefficients_of(module):
    numbers = module["learned"]
    return ([[numbers[f"{a}{n}"], numbers[f"{b}{n}"]] for n in (1, 2)] for a, b in (("b", "d"), ("g_b", "g_d")))


def test_modules_and_the_scores_that_they_saw(results, document, collected, report):
    """Their parameters, the histogram of the scores, and σ over it: in the results and in the figure's table."""
    of_figure = table(report / "figures" / "modulators2-multimax.csv")
    for module in results["multimax"]["modules"]:
        attentions = [sentence.at(module["site"])[module["layer"]] for sentence in collected]
        for numbers, expected in zip(coefficients_of(module), attentions[0].mapping.parameters()):
            torch.testing.assert_close(torch.tensor(numbers), expected.data)
        scores = torch.cat([attention.scores.flatten() for attention in attentions])
        scores = scores[scores.isfinite()]
        edges, counts = module["histogram"]["edges"], module["histogram"]["counts"]
        assert 0.998 * len(scores) <= sum(counts) <= len(scores)  # without the outermost
        assert counts == [int(((low <= scores) & (scores < high)).sum()) for low, high in zip(edges, edges[1:])]
        assert module["lowest_score"] == pytest.approx(scores.min().item(), abs=1e-4)
        assert module["highest_score"] == pytest.approx(scores.max().item(), abs=1e-4)
        sigma = reference.modulator(edges, *coefficients_of(module))
        falling = sum(count for count, low, high in zip(counts, sigma, sigma[1:]) if high < low)
        assert module["falling_share"] == pytest.approx(falling / sum(counts))

        rows = where(of_figure, site=module["site"], layer=str(module["layer"]))
        x, y = ([float(row[name]) for row in rows] for name in ("x", "sigma"))
        assert x == edges and y == pytest.approx(sigma, abs=1e-9)
        areas = [float(row["density"]) * (high - low) for row, low, high in zip(rows, x, x[1:])]
        assert areas == pytest.approx([count / sum(counts) for count in counts])
    assert not any(row["sigma"] for row in drawn(document, "modulators1-stock")[0])  # softmax has only the histogram
    assert results["stock"]["modules"][0]["mapping"] == "softmax" and not results["stock"]["modules"][0]["learned"]


@pytest.mark.parametrize("shift, rows", [(0, "predicting"), (1, "reading")])
def test_alignment_error_of_a_head(shift, rows, results, collected, corpus):
    """Words are tokens here: link each target word to the source word with the largest probability, and count."""
    agreed = total = 0
    gold = (corpus / "text" / "valid.align").read_text().splitlines()
    for sentence, line in zip(collected, gold):
        sure = {tuple(map(int, link.split("-"))) for link in line.split()}
        head = sentence.at("cross")[0].probabilities[0, 1].tolist()
        words = [row[:-1] for row in head[shift:]][: len(head) - 1]  # without </s>
        predicted = {(row.index(max(row)), target) for target, row in enumerate(words)}
        agreed, total = agreed + 2 * len(predicted & sure), total + len(predicted) + len(sure)
    (row,) = where(results["multimax"]["alignment"], layer=0, head="1", rows=rows)
    assert row["aer"] == pytest.approx(1 - agreed / total, abs=1e-12)
    assert {row["head"] for row in results["multimax"]["alignment"]} == {"0", "1", "mean", "rollout"}


def test_the_output_layer_of_a_language_model(checkpoints, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_SIZE", 1000)  # so rows are measured in several parts
    lm_report = analyze([checkpoints["lm"]], corpus / "data-bin-lm", tmp_path / "out", "--split", "test",
                        "--max-sentences", 6, "--max-tokens", 70, "--labels", "ours", "--show", 0)  # fmt: skip
    (model,) = read(lm_report)["models"]["ours"]
    assert {row["site"] for row in model["heads"]} == {"decoder"}
    outputs = [one.at("output")[0] for one in collect_each(checkpoints["lm"], "test", 6)]
    (numbers,) = where(model["sites"], site="output")
    check_numbers(numbers, [(output.scores[0, 0], output.probabilities[0, 0]) for output in outputs])
    # of one model, the common s is the mean of its own irrelevant probabilities
    assert numbers["common_reference"] == pytest.approx(numbers["tail"])
    assert model["modules"][-1]["site"] == "output" and "b1" in model["modules"][-1]["learned"]
    assert ">output<" not in (lm_report / "report.html").read_text().partition("The output layer")[0]


# ---------------------------------------------------------------------- figures


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn(results, name, width=None):
    """The table and the figure of this name."""
    (plan,) = [plan for plan in figures.plans_of(results) if plan.name == name]
    with matplotlib.rc_context(figures.STYLE):
        return plan.rows(), plan.draw(plan.rows(), width)


def test_a_sentence_to_be_drawn(document, collected, corpus):
    """Taken out of a padded batch, it is what the sentence gives by itself, with its words beside it."""
    (example,) = document["models"]["multimax"][0]["examples"]
    known = {line.split()[0] for line in (corpus / "data-bin" / "dict.de.txt").read_text().splitlines()}
    texts = ((corpus / "text" / f"valid.{language}").read_text().splitlines()[3] for language in ("de", "en"))
    german, english = ([word if word in known else "<unk>" for word in text.split()] + ["</s>"] for text in texts)
    written = ["</s>", *english[:-1]]
    axes = {"encoder": [german, german], "decoder": [written, written], "cross": [english, german]}
    assert example["tokens"] == axes
    attention = {site: [layer.probabilities for layer in collected[3].at(site)] for site in axes}
    over_source, _ = metrics.translation_rollout(attention["decoder"], attention["cross"], attention["encoder"])
    rollouts = {"encoder": metrics.attention_rollout(attention["encoder"]), "cross": over_source}
    for shown in example["maps"]:
        site, layer = shown["site"], shown["layer"]
        expected = rollouts[site] if layer == "rollout" else attention[site][layer][0]
        torch.testing.assert_close(torch.tensor(shown["heads"]), expected, atol=2e-5, rtol=0)

    # a head of both models side by side
    rows, figure = drawn(document, "sentence3-cross-layer2-head1")
    left, right = figure.axes[:2]
    assert [left.get_title(), right.get_title()] == ["stock", "multimax"]
    assert [label.get_text() for label in left.get_yticklabels()] == english
    assert [label.get_text() for label in right.get_xticklabels()] == german
    expected = attention["cross"][1][0, 0].flatten()
    assert right.images[0].get_array().flatten().tolist() == pytest.approx(expected.tolist(), abs=2e-5)
    assert [row["share"] for row in where(rows, model="multimax")] == pytest.approx(expected, abs=2e-5)


def test_what_is_drawn_are_the_numbers_of_the_table(report, results, document):
    rows, figure = drawn(document, "sparsity-multimodality")
    expected = [(label, row["head"], row["sparsity"]) for label, model in results.items() for row in model["heads"]]
    assert [(row["model"], row["head"], row["sparsity"]) for row in rows] == expected
    of_file = table(report / "figures" / "sparsity-multimodality.csv")
    assert [(row["model"], int(row["head"]), float(row["sparsity"])) for row in of_file] == expected
    for number, axes in enumerate(figure.axes):
        site, names = ("encoder", "decoder", "cross")[number // 2], figures.METRICS[number % 2]
        for points, means, label in zip(axes.collections, axes.containers, results):
            here = where(rows, site=site, model=label)
            of_model = [[row[name] for name in names] for row in here]
            assert points.get_offsets().tolist() == of_model
            assert [*zip(*means[0].get_data())] == [pytest.approx([fmean(axis) for axis in zip(*of_model)])]
    layers = [row["mad"] for model in results.values() for row in model["layers"]]
    assert [float(row["mad"]) for row in table(report / "figures" / "over-smoothing.csv")] == layers


def test_the_simplex_shows_what_mappings_make_of_three_scores(report):
    rows = table(report / "figures" / "simplex.csv")
    ends = {row["name"]: [float(row[p]) for p in ("p1", "p2", "p3")] for row in rows}  # at the end t = 1.5
    for temperature in (0.25, 0.5, 1, 2):
        expected = reference.softmax([1.5 / temperature, 1.5 / temperature, 0.0])
        assert ends[f"T = {temperature:g}"] == pytest.approx(expected)
    for name in ("entmax15", "sparsemax", "evsoftmax"):
        assert ends[name] == pytest.approx([0.5, 0.5, 0])  # sparse and bimodal
    assert ends["MultiMax, for example"] == pytest.approx(reference.multimax([1.5, 1.5, 0], *ILLUSTRATION))


def test_a_mapping_has_one_colour(document):
    """In whatever place; models with the same mapping differ in shade."""
    models = document["models"]
    first = figures._looks(document)
    turned = figures._looks({"models": {**dict(reversed(models.items())), "again": models["stock"]}})
    assert all(turned[name]["color"] == first[name]["color"] for name in models)
    assert len({look["color"] for look in turned.values()}) == 3


def test_seeds_of_one_model_are_a_mean_with_its_deviation(document):
    seeds = copy.deepcopy(document)
    second = copy.deepcopy(seeds["models"]["multimax"][0])
    for row in second["layers"] + second["heads"]:
        row["mad" if "mad" in row else "sparsity"] += 0.1
    seeds["models"]["multimax"].append(second)
    rows, figure = drawn(seeds, "over-smoothing")
    one, _ = where(rows, model="multimax", side="encoder", layer=1)
    (lines, _, (bars,)) = figure.axes[0].containers[1]
    assert lines.get_ydata()[1] == pytest.approx(one["mad"] + 0.05)
    ends = bars.get_segments()[1][:, 1]
    assert ends[1] - ends[0] == pytest.approx(2 * 0.1 / math.sqrt(2))  # twice the standard deviation
    assert [container.has_yerr for container in figure.axes[0].containers] == [False, True]
    _, figure = drawn(seeds, "sparsity-multimodality")
    across, upright = (bars.get_segments()[0] for bars in figure.axes[0].containers[1][2])
    assert [*across[1] - across[0]] == pytest.approx([2 * 0.1 / math.sqrt(2), 0])
    assert [*upright[1] - upright[0]] == [0, 0]
    text = page.render_page(seeds, [])
    assert "± 0.000" in text and "<td>2</td>" in text


# ---------------------------------------------------------------------- files


def test_the_files_of_a_report(report, results):
    """Each figure as a picture of three kinds and a table; a page that needs nothing else; tables of all numbers."""
    names = {"simplex", "over-smoothing", "sparsity-multimodality", "modulators2-multimax",
             "sentence3-cross-rollout", "sentence3-cross-layer2"}  # fmt: skip
    files = {path.name for path in (report / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf", "csv")}
    texts = ElementTree.parse(report / "figures" / "over-smoothing.svg").iter("{http://www.w3.org/2000/svg}text")
    assert {"stock", "multimax", "encoder"} <= {text.text for text in texts}  # text as text
    assert b"/FontFile2" in (report / "figures" / "over-smoothing.pdf").read_bytes()  # TrueType, not outlines

    text = (report / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == len(names) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", text) and "Word alignment" in text

    tables = {"heads.csv", "sites.csv", "modules.csv", "layers.csv", "alignment.csv"}
    assert {path.name for path in report.glob("*.csv")} == tables
    rows, heads = table(report / "heads.csv"), [row for model in results.values() for row in model["heads"]]
    assert [float(row["entropy"]) for row in rows] == [row["entropy"] for row in heads]
    # both models saw the same sentences: none of fairseq's own layers has got around its attention module
    assert len({(row["site"], row["rows"]) for row in rows}) == 3 and int(rows[0]["rows"]) > SENTENCES
    assert {"b1", "g_d2"} <= table(report / "modules.csv")[-1].keys()


def test_what_the_pages_tables_say(document, results):
    """The best head has the least error; which share of the rows has no M."""
    ours = results["multimax"]
    (row,) = where(page._alignments(document["models"]), model="multimax", rows="reading")
    errors = [head["aer"] for head in where(ours["alignment"], rows="reading") if head["head"].isdigit()]
    assert row["best head"] == [min(errors)] and row["mean of all heads' AER"] == [pytest.approx(fmean(errors))]
    (row,) = where(page._metrics(document["models"], 5), model="multimax", site="decoder")
    (site,) = where(ours["sites"], site="decoder")
    assert row["M"] == [site["multimodality"]]
    assert row["no M (%)"] == pytest.approx(100 * site["multimodality_undefined"] / site["rows"])


def test_drawn_again_from_the_file_alone(report, tmp_path):
    """Without the models, fairseq and torch; figures that are not asked for stay."""
    out = shutil.copytree(report, tmp_path / "report")
    before = {path.name: path.read_bytes() for path in out.rglob("*.png")}
    code = ("import runpy, sys; runpy.run_module('multimax_fairseq.analysis', run_name='__main__'); "
            "print({'torch', 'fairseq'} & {*sys.modules})")  # fmt: skip
    names = "over-smoothing,sentence3-cross-layer?-head2"
    result = run(sys.executable, "-c", code, "--redraw", out, "--figures", names, "--width", "8.4", cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "set()"
    after = {path.name: path.read_bytes() for path in out.rglob("*.png")}
    new = {"over-smoothing.png", "sentence3-cross-layer1-head2.png", "sentence3-cross-layer2-head2.png"}
    assert {name for name in after if after[name] != before.get(name)} == new
    for name in new:
        with Image.open(out / "figures" / name) as image:
            assert abs(image.width - 8.4 / 2.54 * 200) < 1
        assert name[:-4] in (out / "report.html").read_text()
    assert (out / "results.json").read_bytes() == (report / "results.json").read_bytes()


def entropies(out):
    return [row["entropy"] for row in read(out)["models"]["multimax"][0]["heads"]]


NO_MAPS = ["--show", "--figures", "over-smoothing"]


def test_a_report_is_replaced_when_asked_and_a_failure_leaves_nothing(checkpoints, corpus, tmp_path, monkeypatch,
                                                                      capsys):
    out = tmp_path / "out"
    arguments = [checkpoints["multimax"]], corpus / "data-bin", out, *NO_MAPS
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(figures, "_draw_smoothing", lambda *_: 1 / 0)
        analyze(*arguments)
    assert not list(tmp_path.iterdir())
    analyze(*arguments, "--figures", "over-smoothing,none")
    assert "WARNING: --figures: there is no none; choose from: sparsity-multimodality, " in capsys.readouterr().err
    first = entropies(out)
    with pytest.raises(SystemExit, match="is not empty: --force replaces it"):
        analyze(*arguments)
    analyze(*arguments, "--force", "--max-tokens", 30)
    assert entropies(out) == pytest.approx(first, abs=1e-5)  # whatever the size of batches
    (out / "notes.txt").touch()
    with pytest.raises(SystemExit, match="choose another, or empty it"):
        analyze(*arguments, "--force")
    assert (out / "notes.txt").exists()


# ---------------------------------------------------------------------- other models


def test_models_that_differ_in_their_sites(checkpoints, corpus, tmp_path):
    """One has no cross-attention; its decoder attends to source and target together, so it has no rollout there."""
    names = "cross-layer1,decoder-layer1,cross-rollout,encoder-rollout".split(",")
    analyze([checkpoints["multimax"], checkpoints["no-cross"]], corpus / "data-bin", tmp_path / "out", "--show", 0,
            "--labels", "l" * 300, "no $cross",
            "--figures", ",".join(["sparsity*,over*,modulators*", *(f"sentence0-{name}" for name in names)]))
    sites = [{row["site"] for row in model["heads"]} for (model,) in read(tmp_path / "out")["models"].values()]
    assert sites == [{"encoder", "decoder", "cross"}, {"encoder", "decoder"}]
    rows = {name: table(tmp_path / "out" / "figures" / f"sentence0-{name}.csv") for name in names}
    models = {name: len({row["model"] for row in of_name}) for name, of_name in rows.items()}
    assert models == {"cross-layer1": 1, "decoder-layer1": 2, "cross-rollout": 1, "encoder-rollout": 2}
    keys = {(name, model): [row["key"] for row in where(rows[name], model=model, head="1", row="0")]
            for name in rows for model in ("l" * 300, "no $cross")}  # fmt: skip
    read_and_written = keys["encoder-rollout", "no $cross"] + keys["decoder-layer1", "l" * 300]
    assert keys["decoder-layer1", "no $cross"] == read_and_written


def test_sentences_longer_than_learned_positions_are_left_out(build, corpus, tmp_path):
    """As in training; they are in the counts, and no heat map is drawn of them."""
    texts = ((corpus / "text" / f"valid.{language}").read_text().splitlines() for language in ("de", "en"))
    lengths = [1 + max(len(line.split()) for line in lines) for lines in zip(*texts)]
    longest = sorted(lengths)[len(lengths) // 2]
    options = [f"--{side}-learned-pos" for side in ("encoder", "decoder")]
    options += [f"--max-{side}-positions={longest}" for side in ("source", "target")]
    path = save_checkpoint(build("multimax_transformer", *options), tmp_path / "run" / "checkpoint_best.pt")
    analyze([path], corpus / "data-bin", tmp_path / "out", *NO_MAPS, "--max-sentences", 60)
    results = read(tmp_path / "out")
    assert results["models"]["run"][0]["sentences"] == sum(length <= longest for length in lengths) < 60
    assert results["skipped"] == 60 - results["models"]["run"][0]["sentences"]
    with pytest.raises(SystemExit, match="is too long for a model"):
        longest = ["--show", lengths.index(max(lengths))]
        analyze([path], corpus / "data-bin", tmp_path / "other", "--max-sentences", 60, *longest)
    checked = call("check_decoding", "--path", path, corpus / "data-bin", "--split", "valid", "--sentences", 60)
    assert float(checked.stdout.split()[-2]) < 1e-4


def test_what_a_mapping_has_learned_is_in_the_report(monkeypatch):
    """One's own too; a term that is not learned has no gain."""
    tempered = torch.nn.ParameterDict({"temperature": torch.tensor([0.5, 2.0]).view(2, 1, 1)})
    monkeypatch.setitem(MAPPINGS, "tempered", torch.nn.ParameterDict)
    histogram, fixed = ScoreHistogram(), MultiMax(order=1, terms=["above"], init="identity")
    histogram.update(torch.randn(2, 5, 4))
    torch.nn.init.constant_(fixed.gains, 0.5)
    for mapping, name, learned in ((tempered, "tempered", {"temperature": [0.5, 2.0]}),
                                   (fixed, "multimax", {"b1": 0, "d1": 0, "g_b1": 0, "g_d1": 0.5})):  # fmt: skip
        module = {"site": "cross", "layer": 0, **numbers_of_module(mapping, histogram)}
        assert (module["mapping"], module["learned"]) == (name, learned)
        (row,) = page._modules({"one": [{"modules": [module]}]})
        assert row["layer"] == 1 and row.get("temperature", "0.500, 2.000") == "0.500, 2.000"


# ---------------------------------------------------------------------- errors


def changed_data(corpus, folder, pattern, change):
    """The binarised data, with other contents of the files of this pattern; None: without them."""
    data = folder / "data"
    data.mkdir()
    for path in (corpus / "data-bin").iterdir():
        if not path.match(pattern):
            (data / path.name).symlink_to(path)
        elif change:
            (data / path.name).write_bytes(change(path.read_bytes()))
    return data


# Checkpoints beside stock; the data where they are others, of (corpus, folder); options, with files in {folder} and
# the corpus' {text}; what is said.
@pytest.mark.parametrize("others, data, options, message", [
    ([], lambda corpus, folder: folder / "absent", "", "there is no folder"),
    ([], lambda corpus, folder: corpus / "data-bin-lm", "", "cannot be built with the data in"),
    ([], lambda *where: changed_data(*where, "dict.de.txt", None), "", "/dict.de.txt')"),
    ([], lambda *where: changed_data(*where, "dict.*", lambda text: b"".join(text.splitlines(keepends=True)[:50])),
     "", "size mismatch for encoder.embed_tokens.weight"),
    ([], lambda *where: changed_data(*where, "valid.de-en.en.bin", lambda content: content[:900]), "",
     "the split 'valid' of"),
    ([], lambda *where: changed_data(*where, "valid.de-en.de.bin", lambda c: c[:40] + b"\xff\x7f\x00\x00" + c[44:]),
     "", "is damaged, cut short, or not of the fairseq-preprocess that made its dictionary: sentence 1"),
    ([], None, "--split dev", "has no split 'dev' for this model; --split takes one of: test, train, valid"),
    (["lstm"], None, "", "LSTMModel has no attention to analyse"),
    (["multimax"], None, "--labels one", "2 checkpoints need as many --labels"),
    (["multimax"], None, "--labels one one", "models called 'one' differ in more than the seed"),
    ([], None, "--show 60", "--show 60: sentences 0 to 59 are analysed"),
    ([], None, "--alignments {text}/test.align", "there are 40 gold alignments for the 60 sentence pairs"),
    ([], None, "--alignments {folder}/valid.align", "a gold alignment in line 2 is outside of its sentences"),
    ([], None, "--alignments {folder}/absent.align", "absent.align: No such file or directory"),
    ([], None, "--out {folder}/valid.align/out", "valid.align is no folder that can be written to"),
])  # fmt: skip
def test_errors_before_any_work(others, data, options, message, checkpoints, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Measurement, "run", None)  # not reached
    (tmp_path / "valid.align").write_text("0-0\n0-0 99-0\n" + "0-0\n" * 58)
    data = data(corpus, tmp_path) if data else corpus / "data-bin"
    paths = [checkpoints[name] for name in ("stock", *others)]
    with pytest.raises(SystemExit) as stopped:
        analyze(paths, data, tmp_path / "out", *options.format(folder=tmp_path, text=corpus / "text").split(),
                "--max-sentences", 1000)  # fmt: skip
    assert str(stopped.value).startswith("ERROR: ") and message in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1e12, 1e36])
def test_scores_that_no_trained_model_has_are_an_error(factor, checkpoints, corpus, tmp_path):
    state = torch.load(checkpoints["multimax"])
    state["model"]["encoder.layers.0.self_attn.k_proj.weight"] *= factor
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(SystemExit, match="ERROR: .*huge.pt: scores of encoder layer 1 are NaN, infinite or beyond"):
        analyze([tmp_path / "huge.pt"], corpus / "data-bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    ("--redraw {folder}", "is no report: there is no results.json in it"),
    ("--redraw {report} x.pt", "--redraw needs no checkpoints"),
    ("--redraw {report} --figures other", "there is no other; choose from: sparsity-multimodality, "),
    ("--out {folder}/out x.pt", "give checkpoints and --data, or --redraw"),
])  # fmt: skip
def test_wrong_ways_to_draw(arguments, message, report, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(arguments.format(folder=tmp_path, report=report).split())


@pytest.mark.parametrize("name, data", [("multimax", "data-bin"), ("lm", "data-bin-lm")])
def test_the_example(name, data, checkpoints, corpus, tmp_path, monkeypatch, capsys):
    example, picture = ROOT / "examples" / "analysis" / "look.py", tmp_path / "attention.png"
    arguments = [example, checkpoints[name], corpus / data, "--sentence", 1, "--out", picture]
    monkeypatch.setattr("sys.argv", [*map(str, arguments)])
    runpy.run_path(str(example))
    site = "cross" if name == "multimax" else "decoder"
    assert re.search(rf"{site} +layer 1:  M \d\.\d{{3}}  S \d", capsys.readouterr().out)
    with Image.open(picture) as image:
        assert image.width > 3 * image.height / 2
