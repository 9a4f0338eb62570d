"""scripts/results_table.py: tables from the records of runs. That scripts/record_run.py writes such records is tested
with the runs themselves."""

import csv
import io
import json
import random
import re
import statistics
from functools import partial

import pytest
from conftest import call, load_script, rows_of, run
from sacrebleu.metrics import BLEU

SIGNATURE = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
DEFAULT = {"attention_mapping": "multimax", "attention_mapping_sites": "cross,decoder,encoder",
           "output_mapping": "softmax", "multimax_order": 2, "multimax_terms": "above,below",
           "multimax_init": "normal", "entmax_alpha": "1.5"}
results_table = partial(call, "results_table")
WORDS = "a the dog cat man woman runs sleeps sees red small street house in on near and with quickly today".split()


DRAW = random.Random(0)
REFERENCES = [" ".join(DRAW.choices(WORDS, k=DRAW.randint(6, 14))) for _ in range(120)]


def translations(errors, seed):
    """The references with a share of their words replaced: a system of about that quality."""
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < errors else word for word in line.split())
            for line in REFERENCES]


def write_run(folder, seed=1, hypotheses=None, references=REFERENCES, perplexities=None, updates=100,
              experiment="iwslt14_de_en", signature=SIGNATURE, settings=(), kind="perplexity", fault=None, **mapping):
    """A folder as a run leaves it, or with what ``fault`` makes of the record; returns its BLEU."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    if hypotheses:
        bleu = round(BLEU(lowercase="|case:lc|" in signature).corpus_score(hypotheses, [references]).score, 2)
        scores["best"] = {"bleu": bleu, "signature": signature, "details": "", "hypotheses": "best.hypotheses",
                          "references": "best.references"}
        (folder / "best.hypotheses").write_text("\n".join(hypotheses) + "\n")
        (folder / "best.references").write_text("\n".join(references) + "\n")
    for name, perplexity in (perplexities or {}).items():
        scores[name] = {kind: perplexity, "tokens": 1000, "output": f"{name}.eval"}
        (folder / f"{name}.eval").write_text(f"Loss (base 2): 1.0, Perplexity: {perplexity:.2f}\n")
    record = {"format": 2, "experiment": experiment, "scores": scores, "seed": seed, "updates": updates,
              "validation": {"ppl": 5.0 + seed},
              "mapping": load_script("settings").mapping_of({**DEFAULT, **mapping}),
              "settings": {"lr": [0.003], **dict(settings)}}
    if fault:
        fault(record)
    (folder / "run.json").write_text(json.dumps(record))
    return bleu if hypotheses else None


@pytest.fixture(scope="module")
def translation(tmp_path_factory):
    """Two systems with three seeds each, and one with a single seed: (folder, BLEU by system)."""
    folder = tmp_path_factory.mktemp("runs")
    systems = {"multimax": (0.10, (1, 2, 3)), "softmax": (0.12, (1, 2, 3)), "evsoftmax": (0.4, (2,))}
    return folder, {
        name: [write_run(folder / f"{name}-{seed}", seed, translations(errors, f"{name}{seed}"),
                         attention_mapping=name) for seed in seeds]
        for name, (errors, seeds) in systems.items()
    }


def test_mean_and_standard_deviation_over_seeds(translation):
    folder, bleu = translation
    rows = rows_of(results_table(folder).stdout)
    assert list(rows) == ["mapping", "softmax", "EvSoftMax", "MultiMax"]
    column = rows["mapping"].index("BLEU, best")
    for name, values in (("softmax", bleu["softmax"]), ("MultiMax", bleu["multimax"])):
        assert rows[name][column] == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert rows[name][0] == "1 2 3" and rows[name][1] == "7.00 ± 1.00"  # perplexities 6, 7, 8
    assert rows["EvSoftMax"][column] == f"{bleu['evsoftmax'][0]:.2f}"  # one seed has no deviation
    differences = [multimax - softmax for multimax, softmax in zip(bleu["multimax"], bleu["softmax"])]
    assert float(rows["MultiMax"][column + 1].strip("*+")) == pytest.approx(sum(differences) / 3, abs=0.0051)
    assert rows["softmax"][column + 1] == "–"
    assert float(rows["EvSoftMax"][column + 1].replace("−", "-")) == pytest.approx(
        bleu["evsoftmax"][0] - bleu["softmax"][1], abs=0.0051)


@pytest.mark.parametrize("values, expected", [
    ({1: 31.0, 2: 31.2, 3: 31.1}, "**+1.00**"),  # 1 with a deviation of 0.1 and 0.1
    ({1: 30.4, 2: 30.2, 3: 30.3}, "**+0.20**"),
    ({1: 29.9, 2: 30.3, 3: 30.1}, "+0.00"),
    ({1: 29.0, 2: 31.0, 3: 29.7}, "−0.20"),  # 0.2 with a deviation of 1
    ({1: 35.0}, "+5.00"),
    ({4: 35.0}, "–"),
])
def test_a_difference_larger_than_that_between_seeds_is_bold(values, expected):
    assert load_script("results_table").difference(values, {1: 30.0, 2: 30.2, 3: 30.1}) == expected


def test_the_bootstrap_is_sacrebleus(translation, tmp_path):
    """Against sacrebleu's own command, seed by seed."""
    folder, _ = translation
    rows = rows_of(results_table(folder, "--samples", 300).stdout)
    column = rows["mapping"].index("p against softmax")
    assert rows["softmax"][column] == "–"
    for row, name, seeds in (("MultiMax", "multimax", (1, 2, 3)), ("EvSoftMax", "evsoftmax", (2,))):
        expected = []
        for seed in seeds:
            systems = [folder / f"{system}-{seed}" / "best.hypotheses" for system in ("softmax", name)]
            result = run("sacrebleu", folder / f"{name}-{seed}" / "best.references", "-i", *systems, "-m", "bleu",
                         "--paired-bs", "--paired-bs-n", 300, "--format", "json")
            expected.append(json.loads(result.stdout)[1]["BLEU"]["p_value"])
        assert rows[row][column].split() == [f"{p:.3f}" for p in expected]
    assert float(rows["EvSoftMax"][column]) < 0.05  # four times as many errors, over 120 sentences
    for name in ("softmax", "stock"):  # sacrebleu by itself gives the same translations the smallest p that there is
        write_run(tmp_path / name, hypotheses=translations(0.1, 1), attention_mapping=name)
    assert rows_of(results_table(tmp_path).stdout)["softmax (stock fairseq)"][column] == "1.000"


def test_perplexities_of_language_models(tmp_path):
    """ε-perplexity is another quantity: it has a column of its own, and is not subtracted."""
    for seed, value in ((1, 29.0), (2, 30.0)):
        write_run(tmp_path / f"a{seed}", seed, experiment="wikitext103", attention_mapping="softmax",
                  perplexities={"test, context 400": value, "test, context 0": value + 5})
    write_run(tmp_path / "b", 1, experiment="wikitext103", output_mapping="multimax",
              perplexities={"test, context 400": 28.5, "test, context 0": 33.25})
    write_run(tmp_path / "c", 1, experiment="wikitext103", output_mapping="entmax15", kind="epsilon_perplexity",
              perplexities={"test, context 400": 55.5, "test, context 0": 58.25})
    rows = {name: cells[2:] for name, cells in rows_of(results_table(tmp_path).stdout).items()}
    assert rows == {
        "mapping": ["test, context 400", "test, context 0", "test, context 400, ε-perplexity",
                    "test, context 0, ε-perplexity", "test, context 400 − softmax's"],
        "softmax": ["29.50 ± 0.71", "34.50 ± 0.71", "–", "–", "–"],
        "MultiMax; MultiMax of the vocabulary": ["28.50", "33.25", "–", "–", "−0.50"],  # of seed 1
        "MultiMax; 1.5-entmax of the vocabulary": ["–", "–", "55.50", "58.25", "–"],
    }


@pytest.mark.parametrize("mapping, name", [
    ({}, "MultiMax"),
    ({"multimax_order": 1, "multimax_terms": "above"}, "MultiMax, multimax_order 1, multimax_terms above"),
    ({"attention_mapping_sites": "encoder,cross"}, "MultiMax, attention_mapping_sites cross,encoder"),
    ({"attention_mapping_sites": "cross,encoder,decoder", "multimax_terms": "above,below"}, "MultiMax"),
    ({"multimax_init": "shaped", "modulator_lr_scale": 10.0},
     "MultiMax, multimax_init shaped, modulator_lr_scale 10.0"),
    ({"attention_mapping": "softmax", "multimax_order": 1, "entmax_alpha": "learned"}, "softmax"),
    ({"attention_mapping": "softmax", "attention_mapping_sites": "decoder"}, "softmax"),
    ({"attention_mapping": "softmax", "attention_scale": "learned", "attention_mapping_sites": "decoder"},
     "softmax, attention_mapping_sites decoder, attention_scale learned"),
    ({"attention_mapping": "softmax", "output_mapping": "multimax"}, "softmax; MultiMax of the vocabulary"),
    ({"attention_mapping": "entmax"}, "α-entmax, entmax_alpha 1.5"),
    ({"attention_mapping": "stock"}, "softmax (stock fairseq)"),
    ({"attention_mapping": "topk_softmax", "mapping_options": "k=4"}, "topk_softmax, mapping_options k=4"),
])
def test_a_row_is_named_after_what_is_not_the_default(mapping, name):
    """Options without effect, such as an order beside softmax, are no part of what a run was."""
    model = DEFAULT | mapping if mapping.get("attention_mapping") != "stock" else {"arch": "transformer"}
    found = load_script("settings").mapping_of(model)
    assert load_script("results_table").name_of_mapping(found) == name


def test_runs_that_differ_in_a_setting_are_two_rows_that_say_in_what(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", seed, translations(0.1, seed))
        write_run(tmp_path / f"b{seed}", seed, translations(0.2, seed), settings={"lr": [0.001], "fp16": True})
        write_run(tmp_path / f"c{seed}", seed, translations(0.1, seed), attention_mapping="softmax")
    write_run(tmp_path / "own", 1, translations(0.3, 1), attention_mapping="topk_softmax", mapping_options="k=4")
    rows = rows_of(results_table(tmp_path).stdout)
    assert list(rows) == ["mapping", "softmax", "MultiMax", "MultiMax, fp16 True, lr 0.001",
                          "topk_softmax, mapping_options k=4"]
    assert [cells[0] for cells in rows.values()] == ["seeds", "1 2", "1 2", "1 2", "1"]


def test_formats(translation):
    cells = rows_of(results_table(translation[0]).stdout)
    table = list(csv.reader(io.StringIO(results_table(translation[0], "--format", "csv").stdout)))
    assert {row[0]: row[1:] for row in table} == cells
    text = results_table(translation[0], "--format", "latex").stdout
    assert text.startswith("\\begin{tabular}{llllll}\n\\toprule\nmapping & seeds & valid ppl & BLEU, best & ")
    bleu = cells["softmax"][2].replace("±", r"$\pm$")
    assert rf"softmax & 1 2 3 & 7.00 $\pm$ 1.00 & {bleu} & --" in text


def test_what_cannot_be_compared_is_said(tmp_path):
    write_run(tmp_path / "a", 1, translations(0.1, 1), updates=100)
    capitals = [line.upper() for line in translations(0.1, 2)]  # which count only if the signature says so
    write_run(tmp_path / "b", 2, capitals, updates=2000, signature=SIGNATURE.replace("mixed", "lc"))
    text = results_table(tmp_path).stdout
    assert "WARNING: not all runs are equally long" in text and "100 or 2,000 updates" in text
    assert "WARNING: scored in different ways" in text
    write_run(tmp_path / "lm" / "a", 1, perplexities={"test, context 0": 30.0, "test, context 400": 29.0})
    write_run(tmp_path / "lm" / "b", 2, perplexities={"test, context 0": 30.0})
    assert "WARNING: MultiMax, seed 2, has no score test, context 400." in results_table(tmp_path / "lm").stdout


# Of a run beside that of softmax: how it is written, what is then written into its folder, and what is said.
@pytest.mark.parametrize("options, files, message", [
    ({"hypotheses": REFERENCES, "references": REFERENCES[::-1]}, {}, "have different references"),
    ({"signature": SIGNATURE.replace("mixed", "lc")}, {}, "are scored in different ways"),
    ({"attention_mapping": "softmax"}, {}, "are both iwslt14_de_en, softmax, seed 1"),
    ({"hypotheses": None, "perplexities": {"test": 30.0}}, {"test.eval": b"Loss (base 2): 4.9, Perplexity: 29.00\n"},
     "has another perplexity than run.json"),
    ({}, {"best.hypotheses": None}, "multimax/best.hypotheses: No such file"),
    ({}, {"best.hypotheses": b"a\n" * 10}, "multimax/best.hypotheses has 10 lines for 120 references"),
    ({}, {"best.hypotheses": "\n".join(REFERENCES).encode()}, "has BLEU 100.00, and run.json says"),
    ({}, {"best.hypotheses": b"\xff\n" * 120}, "multimax/best.hypotheses is damaged: it is not UTF-8"),
    ({}, {"run.json": b"{"}, "is not, or no longer, a file of record_run.py"),
    ({"fault": lambda record: record.update(format=1)}, {}, "a file of record_run.py (format is 1)"),
    ({"fault": lambda record: record.update(scores={})}, {}, "(it has no scores)"),
    ({"fault": lambda record: record["scores"]["best"].update(bleu=float("nan"))}, {}, "(there is NaN in it)"),
    ({"fault": lambda record: record["scores"]["best"].pop("bleu")}, {}, "(perplexity is None)"),
    ({"fault": lambda record: record.pop("seed")}, {}, "(seed is None)"),
    ({"fault": lambda record: record["mapping"].clear()}, {}, "('attention_mapping')"),
])
def test_a_faulty_folder_is_an_error_that_names_it(options, files, message, tmp_path):
    write_run(tmp_path / "softmax", hypotheses=translations(0.1, 1), attention_mapping="softmax")
    write_run(tmp_path / "multimax", **{"hypotheses": translations(0.1, 2), **options})
    for name, content in files.items():
        path = tmp_path / "multimax" / name
        path.unlink() if content is None else path.write_bytes(content)
    result = results_table(tmp_path, check=False)
    assert result.returncode == 1 and not result.stdout
    assert message in result.stderr and str(tmp_path) in result.stderr and "Traceback" not in result.stderr


def test_an_empty_folder_and_wrong_options_are_errors_in_a_line(tmp_path):
    result = results_table(tmp_path, check=False)
    assert result.returncode == 1 and f"there is no run.json below {tmp_path}" in result.stderr
    result = results_table(tmp_path, "--samples", "0", check=False)
    assert result.returncode == 2 and re.fullmatch(r"ERROR: .*see --help.*\n", result.stderr)
