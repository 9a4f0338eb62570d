"""multimax-analyze on real checkpoints: its numbers against loops over single sentences, its files, its errors."""

import copy
import csv
import json
import math
import re
import shutil
import sys
from argparse import Namespace
from xml.etree import ElementTree

import matplotlib
import pytest
import reference
import torch
from conftest import ROOT, call, run, save_checkpoint
from fairseq import checkpoint_utils
from PIL import Image

from multimax_fairseq.analysis import collect, figures, page
from multimax_fairseq.analysis.cli import main
from multimax_fairseq.analysis.measure import Measurement
from multimax_fairseq.mappings import MAPPINGS

SENTENCES = 12


@pytest.fixture(scope="session")
def checkpoints(build, tmp_path_factory):
    """Untrained, but with weights and modulators large enough that attention is not uniform."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {}
    for name, arch, options in [
        ("stock", "transformer", []),
        ("multimax", "multimax_transformer", []),
        ("no-cross", "multimax_transformer", ["--cross-self-attention", "--no-cross-attention"]),
        ("lm", "multimax_transformer_lm", ["--output-mapping", "multimax"]),
        ("lstm", "tiny_lstm", []),
    ]:
        built = build_lstm(build) if name == "lstm" else build(arch, *options)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter_name, parameter in built.model.named_parameters():
                if "k_proj.weight" in parameter_name:
                    parameter.mul_(4)
                if "mapping" in parameter_name:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.6 - 0.3)
        saved[name] = save_checkpoint(built, folder / name / "checkpoint_best.pt")
    return saved


def build_lstm(build):
    """A model of fairseq whose attention is no MultiheadAttention."""
    from conftest import parse
    from fairseq import tasks

    _, cfg = parse([build("transformer").cfg.task.data, "--arch", "lstm", "--encoder-embed-dim", "8",
                    "--decoder-embed-dim", "8", "--decoder-out-embed-dim", "8", "--encoder-hidden-size", "8",
                    "--decoder-hidden-size", "8"])  # fmt: skip
    return Namespace(model=tasks.setup_task(cfg.task).build_model(cfg.model), cfg=cfg)


def analyze(checkpoints, data, out, *options):
    options = ["--cpu", "--no-progress-bar", "--max-sentences", 3, *options]
    main([*map(str, [*checkpoints, "--data", data, "--out", out, *options])])
    return out


@pytest.fixture(scope="session")
def report(checkpoints, corpus, tmp_path_factory):
    """A report of a stock model and one with MultiMax, on the first sentences of the validation set."""
    return analyze([checkpoints["stock"], checkpoints["multimax"]], corpus / "data-bin",
                   tmp_path_factory.mktemp("report") / "report", "--max-sentences", SENTENCES, "--show", 3,
                   "--alignments", corpus / "text" / "valid.align")  # fmt: skip


@pytest.fixture(scope="session")
def results(report):
    return {model["label"]: model for model in json.loads((report / "results.json").read_text())["models"]}


@pytest.fixture(scope="session")
def collected(checkpoints, corpus):
    """Each sentence by itself, so without padding: what the report's numbers are computed from once more."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoints["multimax"])])
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    return [collect(model, dataset.collater([dataset[index]])) for index in range(SENTENCES)]


def rows_of(collected, site, layer, head):
    """All rows of a head: (scores, probabilities) as lists without absent entries."""
    for sentence in collected:
        attention = sentence.at(site)[layer]
        for scores, probabilities in zip(attention.scores[0, head], attention.probabilities[0, head]):
            there = scores != -math.inf
            yield scores[there].tolist(), probabilities[there].tolist()


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_numbers_of_a_head_are_means_over_single_sentences(site, results, collected):
    layer, head = 1, 0
    rows = list(rows_of(collected, site, layer, head))
    (numbers,) = [
        row for row in results["multimax"]["heads"]
        if (row["site"], row["layer"], row["head"]) == (site, layer, head)
    ]  # fmt: skip
    thresholds = [reference.relevance_threshold(scores) for scores, _ in rows]
    modes = [reference.multimodality(*row, threshold) for row, threshold in zip(rows, thresholds)]
    sparse = [
        # a first target token sees one score, which lies on the threshold
        None if len(x) == 1 else reference.sparsity(x, p, threshold, 1 / len(x))
        for (x, p), threshold in zip(rows, thresholds)
    ]
    assert numbers["rows"] == len(rows)
    assert numbers["multimodality"] == pytest.approx(mean(modes), abs=1e-4)
    assert numbers["sparsity"] == pytest.approx(mean(sparse), abs=1e-4)
    assert numbers["multimodality_undefined"] == modes.count(None)
    assert numbers["sparsity_undefined"] == sparse.count(None) == (SENTENCES if site == "decoder" else 0)
    assert numbers["entropy"] == pytest.approx(mean(reference.entropy(p) for _, p in rows), abs=1e-4)
    assert numbers["top_share"] == pytest.approx(mean(max(p) for _, p in rows), abs=1e-5)


def test_models_of_a_report_share_one_s_a_site(results, report):
    """The geometric mean of their tails; and the page says which, and where M is undefined."""
    caption = re.search(r"<figcaption>(Sparsity against.*?)</figcaption>", (report / "report.html").read_text())[1]
    for site, name in figures.SITE_NAMES.items():
        if site == "output":
            continue
        rows = {label: [row for row in results[label]["sites"] if row["site"] == site] for label in results}
        (stock,), (ours,) = rows["stock"], rows["multimax"]
        assert stock["common_reference"] == pytest.approx(math.sqrt(stock["tail"] * ours["tail"]))
        assert stock["common_reference"] == ours["common_reference"]
        shares = [f"{label} {row['multimodality_undefined'] / row['rows']:.0%}" for label, (row,) in rows.items()]
        assert f"{name}: {', '.join(shares)}" in caption


def test_numbers_of_a_layer_are_means_over_single_sentences(results, collected):
    assert {(row["side"], row["layer"]) for row in results["multimax"]["layers"]} == {
        (side, layer) for side in ("encoder", "decoder") for layer in (0, 1, 2)
    }
    for row in results["multimax"]["layers"]:
        hidden = [
            output.hidden[0].tolist()
            for sentence in collected
            for output in sentence.layers
            if (output.side, output.layer) == (row["side"], row["layer"])
        ]
        assert row["mad"] == pytest.approx(mean(reference.mean_average_distance(h) for h in hidden), abs=1e-5)


def test_modules_and_the_scores_that_they_saw(results, collected, checkpoints):
    parameters = torch.load(checkpoints["multimax"])["model"]
    for module in results["multimax"]["modules"]:
        attention = {"encoder": "encoder.layers.{}.self_attn", "decoder": "decoder.layers.{}.self_attn",
                     "cross": "decoder.layers.{}.encoder_attn"}[module["site"]].format(module["layer"])  # fmt: skip
        thresholds, gains = (parameters[f"{attention}.mapping.{kind}"] for kind in ("thresholds", "gains"))
        expected = [thresholds.flatten().tolist(), gains.flatten().tolist()]
        assert [sum(pairs, []) for pairs in coefficients_of(module)] == [*map(pytest.approx, expected)]
        scores = torch.cat([sentence.at(module["site"])[module["layer"]].scores.flatten() for sentence in collected])
        scores = scores[scores.isfinite()]
        assert sum(module["histogram"]["counts"]) == len(scores)
        assert module["lowest_score"] == pytest.approx(scores.min().item(), abs=1e-4)
        assert module["highest_score"] == pytest.approx(scores.max().item(), abs=1e-4)
    assert "b1" not in results["stock"]["modules"][0] and results["stock"]["modules"][0]["mapping"] == "softmax"


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
    (row,) = [
        row for row in results["multimax"]["alignment"]
        if (row["layer"], row["head"], row["rows"]) == (0, "1", rows)
    ]  # fmt: skip
    assert row["aer"] == pytest.approx(1 - agreed / total, abs=1e-12)
    assert {row["head"] for row in results["multimax"]["alignment"]} == {"0", "1", "mean", "rollout"}


@pytest.fixture(scope="session")
def lm_report(checkpoints, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "report"
    return analyze([checkpoints["lm"]], corpus / "data-bin-lm", out, "--split", "test", "--max-sentences", 6,
                   "--max-tokens", 70, "--labels", "ours", "--show", 0)  # fmt: skip


def test_the_output_layer_of_a_language_model(lm_report, checkpoints):
    (model,) = json.loads((lm_report / "results.json").read_text())["models"]
    assert model["label"] == "ours" and {row["site"] for row in model["heads"]} == {"decoder"}
    (ours,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoints["lm"])])
    task.load_dataset("test")
    dataset = task.dataset("test")
    rows = []
    for index in range(6):
        output = collect(ours, dataset.collater([dataset[index]])).output
        rows += zip(output.scores[0].tolist(), output.probabilities[0].tolist())
    numbers = model["output"]
    modes = [reference.multimodality(x, p, reference.relevance_threshold(x)) for x, p in rows]
    assert numbers["rows"] == len(rows) and numbers["multimodality_undefined"] == 0
    assert numbers["multimodality"] == pytest.approx(mean(modes), abs=1e-5)
    assert numbers["entropy"] == pytest.approx(mean(reference.entropy(p) for _, p in rows), abs=1e-4)
    assert numbers["top_k_share"] == pytest.approx(mean(sum(sorted(p)[-5:]) for _, p in rows), abs=1e-5)
    largest = [reference.multimodality(x, p, sorted(x)[-6]) for x, p in rows]
    assert numbers["top_multimodality"] == pytest.approx(mean(largest), abs=1e-5)
    # of one model, the common s is the mean of its own irrelevant probabilities
    thresholds = [reference.relevance_threshold(x) for x, _ in rows]
    tail = mean(
        mean(q for y, q in zip(x, p) if y < threshold) for (x, p), threshold in zip(rows, thresholds)
    )  # fmt: skip
    assert numbers["common_reference"] == pytest.approx(tail, rel=1e-4)  # a score at ε is on no side
    sparse = [reference.sparsity(x, p, threshold, tail) for (x, p), threshold in zip(rows, thresholds)]
    assert numbers["common_sparsity"] == pytest.approx(mean(sparse), abs=1e-4)
    assert numbers["support"] == pytest.approx(len(rows[0][0]))  # softmax gives something to every word
    assert model["modules"][-1]["site"] == "output" and "b1" in model["modules"][-1]


# ---------------------------------------------------------------------- figures


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drawn(results, name, width=None):
    """The table and the figure of this name."""
    (plan,) = [plan for plan in figures.plans_of(results) if plan.name == name]
    with matplotlib.rc_context(figures.STYLE):
        return plan.rows(), plan.draw(plan.rows(), width)


@pytest.fixture(scope="session")
def document(report):
    return json.loads((report / "results.json").read_text())


def test_a_sentence_to_be_drawn(document, collected, corpus):
    """Taken out of a padded batch, it is what the sentence gives by itself, with its words beside it."""
    (example,) = document["models"][1]["examples"]
    german, english = (
        [*(corpus / "text" / f"valid.{language}").read_text().splitlines()[3].split(), "</s>"]
        for language in ("de", "en")
    )
    known = {line.split()[0] for line in (corpus / "data-bin" / "dict.de.txt").read_text().splitlines()} | {"</s>"}
    german, english = ([word if word in known else "<unk>" for word in words] for words in (german, english))
    written = ["</s>", *english[:-1]]
    axes = {"encoder": [german, german], "decoder": [written, written], "cross": [english, german]}
    assert example["tokens"] == axes
    for attention in example["attention"]:
        expected = collected[3].at(attention["site"])[attention["layer"]].probabilities[0]
        torch.testing.assert_close(torch.tensor(attention["heads"]), expected, atol=2e-5, rtol=0)

    # a head of both models side by side
    rows, figure = drawn(document, "sentence3-cross-layer2-head1")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["stock", "multimax"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == english
    for axes in figure.axes[:2]:
        assert [label.get_text() for label in axes.get_xticklabels()] == german
    expected = collected[3].at("cross")[1].probabilities[0, 0]
    picture = torch.tensor(figure.axes[1].images[0].get_array().data).float()
    torch.testing.assert_close(picture, expected, atol=2e-5, rtol=0)
    assert [row["share"] for row in rows if row["model"] == "multimax"] == pytest.approx(expected.flatten(), abs=2e-5)


def test_what_is_drawn_are_the_numbers_of_the_table(report, results, document):
    rows, figure = drawn(document, "sparsity-multimodality")
    assert [(row["model"], row["head"], row["sparsity"]) for row in rows] == [
        (label, row["head"], row["sparsity"]) for label, model in results.items() for row in model["heads"]
    ]
    assert [float(row["sparsity"]) for row in table(report / "figures" / "sparsity-multimodality.csv")] == [
        row["sparsity"] for row in rows
    ]
    for number, axes in enumerate(figure.axes):
        site, names = ("encoder", "decoder", "cross")[number % 3], figures.METRICS[number // 3]
        for points, means, label in zip(axes.collections, axes.containers, results):
            here = [row for row in rows if (row["site"], row["model"]) == (site, label)]
            of_model = [[row[name] for name in names] for row in here]
            assert points.get_offsets().tolist() == of_model
            assert [*zip(*means[0].get_data())] == [pytest.approx([mean(axis) for axis in zip(*of_model)])]
    for row in table(report / "figures" / "over-smoothing.csv"):
        (expected,) = [
            layer["mad"] for layer in results[row["model"]]["layers"]
            if (layer["side"], str(layer["layer"])) == (row["side"], row["layer"])
        ]  # fmt: skip
        assert float(row["mad"]) == expected and not row["standard_deviation"]


def coefficients_of(module):
    return ([[module[f"{a}{n}"], module[f"{b}{n}"]] for n in (1, 2)] for a, b in (("b", "d"), ("g_b", "g_d")))


def test_sigma_is_the_formula_over_the_scores(report, results):
    rows = table(report / "figures" / "multimax-modulators.csv")
    for module in results["multimax"]["modules"]:
        place = [row for row in rows if (row["site"], row["layer"]) == (module["site"], str(module["layer"]))]
        x, y = ([float(row[axis]) for row in place if row["curve"] == "sigma"] for axis in "xy")
        thresholds, gains = coefficients_of(module)
        assert y == pytest.approx(reference.modulator(x, thresholds, gains), abs=1e-9)
        width = module["histogram"]["edges"][1] - module["histogram"]["edges"][0]
        assert module["lowest_score"] - width <= x[0] < x[-1] <= module["highest_score"] + width
        density = [float(row["y"]) for row in place if row["curve"] == "density"]
        assert sum(density) * width == pytest.approx(1, abs=2e-3)  # but for the outermost scores
    assert {row["curve"] for row in table(report / "figures" / "stock-modulators.csv")} == {"density"}


def test_the_simplex_shows_what_mappings_make_of_three_scores(report, results):
    rows = table(report / "figures" / "simplex.csv")
    ends = {row["name"]: [float(row[p]) for p in ("p1", "p2", "p3")] for row in rows}
    for temperature in (0.25, 0.5, 1, 2):
        expected = reference.softmax([1.5 / temperature, 1.5 / temperature, 0.0])  # at the end t = 1.5
        assert ends[f"T = {temperature:g}"] == pytest.approx(expected)
    for name in ("entmax15", "sparsemax", "evsoftmax"):
        assert ends[name] == pytest.approx([0.5, 0.5, 0])  # sparse and bimodal
    module = next(m for m in results["multimax"]["modules"] if (m["site"], m["layer"]) == ("cross", 1))
    (name,) = [name for name in ends if name.startswith("cross 2")]
    high, low = map(float, re.findall(r"-?\d+\.\d", name))
    thresholds, gains = coefficients_of(module)
    assert ends[name] == pytest.approx(reference.multimax([high, high, low], thresholds, gains), abs=0.05)


def test_a_mapping_has_one_colour_and_names_fit(document):
    """In whatever place, and however long names are; models with the same mapping differ in shade."""
    first = {model["label"]: figures._looks(document)[model["label"]] for model in document["models"]}
    stock, multimax = ({**model, "label": model["label"] + " of a long name" * 6} for model in document["models"])
    turned = {**document, "models": [multimax, stock, {**stock, "label": "again"}]}
    looks = figures._looks(turned)
    for model, label in zip(turned["models"], ("multimax", "stock")):
        assert looks[model["label"]]["color"] == first[label]["color"]
    assert looks["again"]["color"] not in [look["color"] for look in first.values()]
    for name in ("sparsity-multimodality", "over-smoothing"):
        for width in (8.4 / 2.54, None):
            _, figure = drawn(turned, name, width)
            figure.draw_without_rendering()
            box = figure.legends[0].get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_seeds_of_one_model_are_a_mean_with_its_deviation(document):
    seeds = copy.deepcopy(document)
    seeds["models"].append(copy.deepcopy(seeds["models"][1]))
    for layer in seeds["models"][2]["layers"]:
        layer["mad"] += 0.1
    rows, figure = drawn(seeds, "over-smoothing")
    for row, layer in zip([row for row in rows if row["model"] == "multimax"], seeds["models"][1]["layers"]):
        assert row["mad"] == pytest.approx(layer["mad"] + 0.05)
        assert row["standard_deviation"] == pytest.approx(0.1 / math.sqrt(2))
    assert [container.has_yerr for container in figure.axes[0].containers] == [False, True]
    text = page.render_page(seeds, [])
    assert "± 0.000" in text and "multimax (2)" in text and "<td>2</td>" in text


# ---------------------------------------------------------------------- files


def test_the_page_needs_no_other_file_and_no_network(report):
    page = (report / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(list((report / "figures").glob("*.png"))) >= 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", page)
    assert "multimax" in page and "Word alignment" in page


def test_every_figure_is_there_as_picture_and_table(report):
    names = {"simplex", "over-smoothing", "sparsity-multimodality", "alignment", "stock-modulators",
             "multimax-modulators", *(f"sentence3-{name}" for name in ("encoder-rollout", "cross-rollout",
             "cross-layer2"))}  # fmt: skip
    files = {path.name for path in (report / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf", "csv")}
    for name in names:
        with Image.open(report / "figures" / f"{name}.png") as image:
            assert image.width <= 1400  # 7 inch, the width of a page, at 200 dpi
        ElementTree.parse(report / "figures" / f"{name}.svg")
    texts = ElementTree.parse(report / "figures" / "over-smoothing.svg").iter("{http://www.w3.org/2000/svg}text")
    assert {"stock", "multimax", "encoder"} <= {text.text for text in texts}  # text as text
    assert b"/FontFile2" in (report / "figures" / "over-smoothing.pdf").read_bytes()  # TrueType, not outlines


def test_csv_holds_the_numbers_of_json(report, results):
    rows = table(report / "heads.csv")
    expected = [(label, row) for label, model in results.items() for row in model["heads"]]
    assert len(rows) == len(expected) == 2 * 6 * 2
    # both models saw the same sentences: none of fairseq's own layers has got around its attention module
    assert len({(row["site"], row["rows"]) for row in rows}) == 3 and int(rows[0]["rows"]) > SENTENCES
    for row, (label, numbers) in zip(rows, expected):
        assert row["model"] == label and float(row["entropy"]) == numbers["entropy"]
    tables = {"heads.csv", "sites.csv", "modules.csv", "layers.csv", "alignment.csv"}
    assert {path.name for path in report.glob("*.csv")} == tables


def test_drawn_again_from_the_file_alone(report, tmp_path):
    """Without the models, fairseq and torch; figures that are not asked for stay."""
    out = shutil.copytree(report, tmp_path / "report")
    before = {path.name: path.read_bytes() for path in out.rglob("*.png")}
    code = "from multimax_fairseq.analysis.cli import main, sys; main(); print({'torch', 'fairseq'} & {*sys.modules})"
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


NO_MAPS = ["--show", "--figures", "over-smoothing"]


def test_a_failure_leaves_nothing_behind(checkpoints, corpus, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(figures, "_draw_smoothing", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        analyze([checkpoints["multimax"]], corpus / "data-bin", tmp_path / "new" / "out", *NO_MAPS)
    assert not list((tmp_path / "new").iterdir())


def test_force_replaces_a_report_and_nothing_else(checkpoints, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    arguments = [checkpoints["multimax"]], corpus / "data-bin", out, *NO_MAPS
    analyze(*arguments, "--figures", "over-smoothing,none")
    assert "WARNING: --figures: there is no none; choose from: sparsity-multimodality, " in capsys.readouterr().err
    first = (out / "results.json").read_text()
    with pytest.raises(SystemExit, match="is not empty: --force replaces it"):
        analyze(*arguments)
    analyze(*arguments, "--force", "--max-tokens", 30)
    second = (out / "results.json").read_text()
    values = [[row["entropy"] for row in json.loads(text)["models"][0]["heads"]] for text in (first, second)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)  # whatever the size of batches
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="choose another, or empty it"):
        analyze(*arguments, "--force")
    assert (out / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------- other models


def test_models_that_differ_in_their_sites(checkpoints, corpus, tmp_path):
    """One has no cross-attention; its decoder attends to source and target together."""
    analyze([checkpoints["multimax"], checkpoints["no-cross"]], corpus / "data-bin", tmp_path / "out", "--show", 1,
            "--labels", "l" * 300, "no $cross",
            "--figures", "*layer?,*rollout,sparsity*,over*,*modulators,simplex")  # fmt: skip
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert [{row["site"] for row in model["heads"]} for model in (first, second)] == [
        {"encoder", "decoder", "cross"}, {"encoder", "decoder"},
    ]  # fmt: skip
    rows = {name: table(tmp_path / "out" / "figures" / f"sentence1-{name}.csv")
            for name in ("cross-layer1", "decoder-layer1", "cross-rollout")}  # fmt: skip
    models = {name: len({row["model"] for row in of_name}) for name, of_name in rows.items()}
    assert models == {"cross-layer1": 1, "decoder-layer1": 2, "cross-rollout": 2}


def test_sentences_longer_than_learned_positions_are_left_out(build, corpus, tmp_path):
    """As in training; they are in the counts, and no heat map is drawn of them."""
    lengths = [1 + max(len(line.split()) for line in lines) for lines in zip(
        *((corpus / "text" / f"valid.{language}").read_text().splitlines() for language in ("de", "en"))
    )]  # fmt: skip
    longest = sorted(lengths)[len(lengths) // 2]
    options = [f"--{side}-learned-pos" for side in ("encoder", "decoder")]
    options += [f"--max-{side}-positions={longest}" for side in ("source", "target")]
    path = save_checkpoint(build("multimax_transformer", *options), tmp_path / "run" / "checkpoint_best.pt")
    analyze([path], corpus / "data-bin", tmp_path / "out", *NO_MAPS, "--max-sentences", 60)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["models"][0]["sentences"] == sum(length <= longest for length in lengths) < 60
    assert results["skipped"] == 60 - results["models"][0]["sentences"]
    with pytest.raises(SystemExit, match="is too long for a model"):
        longest = ["--show", lengths.index(max(lengths))]
        analyze([path], corpus / "data-bin", tmp_path / "other", "--max-sentences", 60, *longest)
    checked = call("check_decoding", "--path", path, corpus / "data-bin", "--split", "valid", "--sentences", 60)
    assert float(checked.stdout.split()[-2]) < 1e-4


def test_the_numbers_of_a_mapping_of_ones_own_are_in_the_report(monkeypatch):
    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor([0.5, 2.0]).view(2, 1, 1))

    monkeypatch.setitem(MAPPINGS, "tempered", Tempered)
    measurement = Measurement(Namespace(model=torch.nn.Identity()))
    scores = torch.randn(2, 5, 4)
    measurement._add(("cross", 0), "cross layer 1", Tempered(), scores, scores.softmax(-1))
    module = measurement._module(("cross", 0))
    assert module["mapping"] == "tempered" and module["temperature"] == [0.5, 2.0]
    (row,) = page._modules({"one's own": [{"modules": [module]}]})
    assert row["temperature"] == "0.500, 2.000" and row["layer"] == 1


# ---------------------------------------------------------------------- errors


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(*arguments, message=…): the command ends with this error before any work."""

    def refused(*arguments, message):
        monkeypatch.setattr("multimax_fairseq.analysis.measure.Measurement.run", None)  # not reached
        with pytest.raises(SystemExit) as stopped:
            main(["--out", str(tmp_path / "out"), "--cpu", *map(str, arguments)])
        error = str(stopped.value)
        assert error.startswith("ERROR: ") and message in error
        assert not (tmp_path / "out").exists()

    return refused


def changed_data(corpus, tmp_path, pattern, change):
    """The binarised data, with other contents of the files of this pattern; None: without them."""
    data = tmp_path / "data"
    data.mkdir()
    for path in (corpus / "data-bin").iterdir():
        if not path.match(pattern):
            (data / path.name).symlink_to(path)
        elif change:
            (data / path.name).write_bytes(change(path.read_bytes()))
    return data


# The data where they are others, of (corpus, tmp_path); and what is said.
@pytest.mark.parametrize("data, message", [
    (lambda corpus, folder: folder / "absent", "there is no folder"),
    (lambda corpus, folder: corpus / "data-bin-lm", "its model cannot be built with the data in"),
    (lambda *where: changed_data(*where, "dict.de.txt", None), "has no dictionary dict.de.txt"),
    (lambda *where: changed_data(*where, "dict.*", lambda text: b"".join(text.splitlines(keepends=True)[:50])),
     "the vocabulary of"),
    (lambda *where: changed_data(*where, "valid.de-en.en.bin", lambda content: content[:900]),
     "the split 'valid' of"),
    (lambda *where: changed_data(*where, "valid.de-en.de.bin", lambda c: c[:40] + b"\xff\x7f\x00\x00" + c[44:]),
     "has words that its dictionary lacks"),
])  # fmt: skip
def test_wrong_data_are_named_before_any_work(data, message, checkpoints, corpus, tmp_path, refused):
    refused(checkpoints["stock"], "--data", data(corpus, tmp_path), message=message)


# The other checkpoints, and options after them; files are in {folder} and the corpus' {text}. What is said.
@pytest.mark.parametrize("others, options, message", [
    ([], ["--split", "dev"], "has no split 'dev' for this model; --split takes one of: test, train, valid"),
    (["lstm"], [], "LSTMModel has no attention to analyse"),
    (["multimax"], ["--labels", "one"], "2 checkpoints need as many --labels"),
    (["multimax"], ["--labels", "one", "one"], "models called 'one' differ in more than the seed"),
    ([], ["--show", "60"], "--show 60: sentences 0 to 59 are analysed"),
    ([], ["--alignments", "{text}/test.align"], "there are 40 gold alignments for the 60 sentence pairs"),
    ([], ["--alignments", "{folder}/valid.align"], "gold alignment 99-0 in line 2 is outside of its sentences"),
    ([], ["--alignments", "{folder}/absent.align"], "absent.align: No such file or directory"),
    ([], ["--out", "{folder}/valid.align/out"], "is not a folder: choose another"),
])  # fmt: skip
def test_wrong_options_are_named_before_any_work(others, options, message, checkpoints, corpus, tmp_path, refused):
    (tmp_path / "valid.align").write_text("0-0\n0-0 99-0\n" + "0-0\n" * 58)
    options = [option.format(folder=tmp_path, text=corpus / "text") for option in options]
    paths = [checkpoints[name] for name in ("stock", *others)]
    refused(*paths, "--data", corpus / "data-bin", *options, message=message)


@pytest.mark.parametrize("factor", [1e12, 1e36])
def test_scores_that_no_trained_model_has_are_an_error(factor, checkpoints, corpus, tmp_path):
    state = torch.load(checkpoints["multimax"])
    for name, tensor in state["model"].items():
        if "k_proj.weight" in name:
            tensor *= factor
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(SystemExit, match="ERROR: .*huge.pt: scores of encoder layer 1 are NaN, infinite or beyond"):
        analyze([tmp_path / "huge.pt"], corpus / "data-bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--redraw", "{folder}"], "is no report: there is no results.json in it"),
    (["--redraw", "{report}", "x.pt"], "--redraw needs no checkpoints"),
    (["--redraw", "{report}", "--figures", "other"], "there is no other; choose from: sparsity-multimodality, "),
    (["--out", "{folder}/out", "x.pt"], "give checkpoints and --data, or --redraw"),
])  # fmt: skip
def test_wrong_ways_to_draw(arguments, message, report, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([argument.format(folder=tmp_path, report=report) for argument in arguments])


@pytest.mark.parametrize("name, data", [("multimax", "data-bin"), ("lm", "data-bin-lm")])
def test_the_example(name, data, checkpoints, corpus, tmp_path):
    result = run("python", ROOT / "examples" / "analysis" / "look.py", checkpoints[name], corpus / data,
                 "--sentence", 1, "--out", tmp_path / "attention.png", cwd=ROOT)  # fmt: skip
    site = "cross" if name == "multimax" else "decoder"
    assert re.search(rf"{site} +layer 1:  M \d\.\d{{3}}  S \d", result.stdout)
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width > 3 * image.height / 2


def test_as_a_command(checkpoints, corpus, tmp_path):
    module = [sys.executable, "-m", "multimax_fairseq.analysis"]
    assert "--max-sentences" in run(*module, "--help", cwd=ROOT).stdout
    result = run(*module, checkpoints["lstm"], "--data", corpus / "data-bin", "--out", tmp_path / "out",
                 check=False, cwd=ROOT)  # fmt: skip
    assert result.returncode == 1 and "ERROR: " in result.stderr and "Traceback" not in result.stderr
