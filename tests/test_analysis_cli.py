"""multimax-analyze on real checkpoints: its numbers against loops over single sentences, its files, its errors."""

import csv
import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest
import reference
import torch
from conftest import ROOT, run, save_checkpoint
from fairseq import checkpoint_utils
from PIL import Image

from multimax_fairseq.analysis import collect, figures
from multimax_fairseq.analysis.checkpoint import batches, load
from multimax_fairseq.analysis.cli import main
from multimax_fairseq.analysis.measure import Measurement

SENTENCES = 12


@pytest.fixture(scope="session")
def checkpoints(build, tmp_path_factory):
    """Untrained, but with weights and modulators large enough that attention is not uniform."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {}
    for name, arch, options in [
        ("stock", "transformer", []),
        ("multimax", "multimax_transformer", []),
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
    from argparse import Namespace

    from conftest import parse
    from fairseq import tasks

    _, cfg = parse([build("transformer").cfg.task.data, "--arch", "lstm", "--encoder-embed-dim", "8",
                    "--decoder-embed-dim", "8", "--decoder-out-embed-dim", "8", "--encoder-hidden-size", "8",
                    "--decoder-hidden-size", "8"])  # fmt: skip
    return Namespace(model=tasks.setup_task(cfg.task).build_model(cfg.model), cfg=cfg)


@pytest.fixture(scope="session")
def report(checkpoints, corpus, tmp_path_factory):
    """A report of a stock model and one with MultiMax, on the first sentences of the validation set."""
    out = tmp_path_factory.mktemp("report") / "report"
    main([str(checkpoints["stock"]), str(checkpoints["multimax"]), "--data", str(corpus / "data-bin"),
          "--out", str(out), "--max-sentences", str(SENTENCES), "--cpu", "--no-progress-bar", "--show",
          "--alignments", str(corpus / "text" / "valid.align")])  # fmt: skip
    return out


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
        assert [module[name] for name in ("b1", "d1", "b2", "d2")] == pytest.approx(thresholds.flatten().tolist())
        assert [module[name] for name in ("g_b1", "g_d1", "g_b2", "g_d2")] == pytest.approx(gains.flatten().tolist())
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
    main([str(checkpoints["lm"]), "--data", str(corpus / "data-bin-lm"), "--split", "test", "--out", str(out),
          "--cpu", "--no-progress-bar", "--max-sentences", "6", "--max-tokens", "70", "--labels", "ours",
          "--show", "0"])  # fmt: skip
    return out


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


@pytest.fixture(scope="session")
def measurement(checkpoints, corpus):
    """Of the model with MultiMax, keeping sentence 3 for heat maps."""
    cpu = torch.device("cpu")
    loaded = load(checkpoints["multimax"], "multimax", corpus / "data-bin", "valid", SENTENCES, cpu)
    measurement = Measurement(loaded, examples=[3])
    for sample in batches(loaded, max_tokens=100, device=cpu):
        measurement.update(sample)
    return measurement


def test_a_sentence_to_be_drawn(measurement, collected, corpus):
    """Taken out of a padded batch, it is what the sentence gives by itself, with its words beside it."""
    (example,) = measurement.examples.values()
    german, english = (
        [*(corpus / "text" / f"valid.{language}").read_text().splitlines()[3].split(), "</s>"]
        for language in ("de", "en")
    )
    known = set(measurement.loaded.source_dictionary.symbols)
    german, english = ([word if word in known else "<unk>" for word in words] for words in (german, english))
    written = ["</s>", *english[:-1]]
    assert example.tokens == {"encoder": (german, german), "decoder": (written, written), "cross": (english, german)}
    for (site, layer), attention in example.attention.items():
        torch.testing.assert_close(attention, collected[3].at(site)[layer].probabilities[0], atol=1e-5, rtol=0)
    assert example.rollout["cross"].shape == (len(english), len(german))

    figure = figures.draw_attention(example, "cross", 1)
    for head, axes in enumerate(figure.axes[:2]):
        assert [label.get_text() for label in axes.get_yticklabels()] == english
        assert [label.get_text() for label in axes.get_xticklabels()] == german
        drawn = torch.tensor(axes.images[0].get_array().data)
        torch.testing.assert_close(drawn, example.attention["cross", 1][head], check_dtype=False)


def test_points_and_lines_are_the_numbers(measurement):
    figure = figures.draw_sparsity_and_multimodality([measurement])
    for number, axes in enumerate(figure.axes):
        site = ("encoder", "decoder", "cross")[number % 3]
        names = ("sparsity", "multimodality") if number < 3 else ("common_sparsity", "top_multimodality")
        rows = [row for row in measurement.head_rows() if row["site"] == site]
        points = axes.collections[0].get_offsets().tolist()
        assert points == [[row[name] for name in names] for row in rows]
        (middle,) = axes.collections[1].get_offsets().tolist()
        assert middle == pytest.approx([mean([row[name] for row in rows]) for name in names])
        named = f"= {rows[0]['common_reference']:.2g}" if number >= 3 else "1/K"
        assert named in axes.get_xlabel() and axes.get_title() == (figures.SITE_NAMES[site] if number < 3 else "")
    figure = figures.draw_smoothing([measurement])
    for axes, side in zip(figure.axes, ("encoder", "decoder")):
        expected = [(row["layer"], row["mad"]) for row in measurement.layer_rows() if row["side"] == side]
        assert list(zip(*axes.lines[0].get_data())) == expected


def test_sigma_is_drawn_by_the_formula_over_the_scores(measurement):
    modules = [module for module in measurement.modules.values() if module.site == "cross"]
    figure = figures.draw_modulators(modules, "multimax")
    for axes, module in zip(figure.axes, modules):
        identity, sigma = axes.lines
        x, y = (values.tolist() for values in sigma.get_data())
        assert y == pytest.approx(reference.modulator(x, *(rows.tolist() for rows in module.parameters)), abs=1e-9)
        assert module.histogram.low - module.histogram.width <= x[0] < x[-1] <= (
            module.histogram.high + module.histogram.width
        )
        assert identity.get_xdata().tolist() == identity.get_ydata().tolist()


def test_the_simplex_shows_what_mappings_make_of_the_three_scores():
    softmax, others, ours = figures.draw_simplex().axes[:3]
    for line, temperature in zip([line for line in softmax.lines if line.get_label()[0] == "T"], (0.25, 0.5, 1, 2)):
        p = reference.softmax([1.5 / temperature, 1.5 / temperature, 0.0])  # the end, where t = 1.5
        end = [values[-1] for values in line.get_data()]
        assert end == pytest.approx([p[1] + p[2] / 2, p[2] * math.sqrt(3) / 2])
    named = {line.get_label(): line for line in [*others.lines, *ours.lines]}
    assert {"softmax", "1.5-entmax", "sparsemax", "EvSoftMax", "MultiMax, illustrative"} <= set(named)
    # sparse and bimodal at the end: the middle of the lower edge
    for name in ("1.5-entmax", "sparsemax", "EvSoftMax"):
        assert [values[-1] for values in named[name].get_data()] == pytest.approx([0.5, 0])
    x, y = (values[-1] for values in named["MultiMax, illustrative"].get_data())
    assert x == pytest.approx(0.5) and 0 < y < named["softmax"].get_ydata()[-1] / 2


# ---------------------------------------------------------------------- files


def test_the_page_needs_no_other_file_and_no_network(report):
    page = (report / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == len(list((report / "figures").glob("*.png"))) >= 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<script|<link", page)
    assert "multimax" in page and "Word alignment" in page


def test_every_figure_is_there_as_png_and_svg(report, lm_report):
    sentence = {path.stem for path in (lm_report / "figures").glob("ours-0-*.svg")}
    assert sentence == {"ours-0-decoder-layer1", "ours-0-decoder-layer2", "ours-0-decoder-rollout"}
    assert "ours, sentence 0" in (lm_report / "report.html").read_text()
    pictures = sorted((report / "figures").glob("*.png"))
    names = {path.stem for path in pictures}
    assert names == {path.stem for path in (report / "figures").glob("*.svg")}
    assert {"simplex", "orders", "over-smoothing", "sparsity-multimodality", "alignment"} <= names
    assert {"stock-modulators", "multimax-modulators"} <= names
    for path in pictures:
        with Image.open(path) as image:
            assert image.width <= 1400  # 7 inch, the width of a page, at 200 dpi
        ElementTree.parse(path.with_suffix(".svg"))


def test_csv_holds_the_numbers_of_json(report, results):
    with open(report / "heads.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(label, row) for label, model in results.items() for row in model["heads"]]
    assert len(rows) == len(expected) == 2 * 6 * 2
    # both models saw the same sentences: none of fairseq's own layers has got around its attention module
    assert len({(row["site"], row["rows"]) for row in rows}) == 3 and int(rows[0]["rows"]) > SENTENCES
    for row, (label, numbers) in zip(rows, expected):
        assert row["model"] == label and float(row["entropy"]) == numbers["entropy"]
    tables = {"heads.csv", "sites.csv", "modules.csv", "layers.csv", "alignment.csv"}
    assert {path.name for path in report.glob("*.csv")} == tables


def analyze(checkpoint, data, out, *options):
    main([str(checkpoint), "--data", str(data), "--out", str(out), "--cpu", "--no-progress-bar", "--show",
          "--max-sentences", "3", *map(str, options)])  # fmt: skip


def test_a_failure_leaves_nothing_behind(checkpoints, corpus, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(figures, "draw_simplex", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        analyze(checkpoints["multimax"], corpus / "data-bin", tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())


def test_force_replaces_a_report_and_nothing_else(checkpoints, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "drawings_of", lambda measurements: [])  # takes the time, and is seen elsewhere
    out = tmp_path / "out"
    out.mkdir()
    analyze(checkpoints["multimax"], corpus / "data-bin", out)
    first = (out / "results.json").read_text()
    with pytest.raises(SystemExit, match="is not empty: --force replaces it"):
        analyze(checkpoints["multimax"], corpus / "data-bin", out)
    analyze(checkpoints["multimax"], corpus / "data-bin", out, "--force", "--max-tokens", 30)
    second = (out / "results.json").read_text()
    values = [[row["entropy"] for row in json.loads(text)["models"][0]["heads"]] for text in (first, second)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)  # whatever the size of batches
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="choose another, or empty it"):
        analyze(checkpoints["multimax"], corpus / "data-bin", out, "--force")
    assert (out / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------------- errors


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(*arguments, message=…): the command ends with this error before any work."""

    def refused(*arguments, message):
        monkeypatch.setattr("multimax_fairseq.analysis.measure.Measurement.update", None)  # not reached
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


def empty_split(corpus, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for language in ("de", "en"):
        (text / f"nothing.{language}").write_text("")
    data = corpus / "data-bin"
    run("fairseq-preprocess", "--source-lang", "de", "--target-lang", "en", "--validpref", text / "nothing",
        "--srcdict", data / "dict.de.txt", "--tgtdict", data / "dict.en.txt",
        "--destdir", tmp_path / "data")  # fmt: skip
    return tmp_path / "data"


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
    (empty_split, "is empty: there is nothing in it"),
])  # fmt: skip
def test_wrong_data_are_named_before_any_work(data, message, checkpoints, corpus, tmp_path, refused):
    refused(checkpoints["stock"], "--data", data(corpus, tmp_path), message=message)


# The other checkpoints, and options after them; files are in {folder} and the corpus' {text}. What is said.
@pytest.mark.parametrize("others, options, message", [
    ([], ["--split", "dev"], "has no split 'dev' for this model; --split takes one of: test, train, valid"),
    (["lstm"], [], "LSTMModel has no attention to analyse"),
    (["stock"], [], "the same checkpoint is given twice"),
    (["multimax"], ["--labels", "one"], "2 checkpoints need as many different --labels"),
    ([], ["--show", "60"], "--show 60: sentences 0 to 59 are analysed"),
    ([], ["--alignments", "{text}/test.align"], "there are 40 gold alignments for the 60 sentence pairs"),
    ([], ["--alignments", "{folder}/valid.align"], "gold alignment 99-0 in line 2 is outside of its sentences"),
    ([], ["--alignments", "{folder}/absent.align"], "there is no file"),
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
        analyze(tmp_path / "huge.pt", corpus / "data-bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--cross-self-attention"], ["--cross-self-attention", "--no-cross-attention"]])
def test_decoders_that_attend_to_source_and_target_together(options, build, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "drawings_of", lambda measurements: [])  # takes the time, and is seen elsewhere
    path = save_checkpoint(build("transformer", *options), tmp_path / "run" / "checkpoint_best.pt")
    main([str(path), "--data", str(corpus / "data-bin"), "--out", str(tmp_path / "out"), "--cpu",
          "--no-progress-bar", "--show", "1", "--max-sentences", "3", "--labels", "l" * 300])  # fmt: skip
    (model,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert {row["site"] for row in model["heads"]} == {"encoder", "decoder", "cross"} - (
        {"cross"} if len(options) > 1 else set()
    )
    assert list((tmp_path / "out" / "figures").glob("*-1-decoder-layer1.png"))
    assert list((tmp_path / "out" / "figures").glob("*-1-cross-rollout.png"))


@pytest.mark.parametrize("name, data", [("multimax", "data-bin"), ("lm", "data-bin-lm")])
def test_the_example(name, data, checkpoints, corpus, tmp_path):
    result = run(sys.executable, ROOT / "examples" / "analysis" / "look.py", checkpoints[name], corpus / data,
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
