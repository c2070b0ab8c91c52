"""From runs to verdicts: the pieces of `report` that claims.md fixes, on made-up results."""

from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest

from lab import paths
from lab.claims import evidence
from lab.claims.judge import Verdict
from lab.claims.ledger import ledger
from lab.data.cards import load_resized
from lab.experiments import catalogue, profiles, small
from lab.experiments.catalogue import NOTEBOOKS, Runs
from lab.paper import paper_table
from lab.report import counted, figures, paper, render, tables
from lab.runs import execute, results, store
from lab.runs.results import Result
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.stats import Estimate
from vitlib.train.dvae import DVAEConfig

ABOUT = dict.fromkeys(results.ABOUT, "") | {"split": "test", "cpu_s": 1.0, "device": "made up"}


def experiment(number: str, name: str) -> catalogue.Experiment:
    return catalogue.experiment(catalogue.notebook(number), profiles.profile(name))


def runs_of(notebook: str, profile: str) -> Runs:
    """What is finished of a notebook's arms."""
    return experiment(notebook, profile).finished()


def nothing(notebook: str) -> Runs:
    """A committed reference that has no runs of a notebook."""
    return Runs(experiment(notebook, "study"), {})


def printed(frame) -> pd.DataFrame:
    return tables.printed(frame).set_index(tables.printed(frame).columns[0])


@pytest.fixture(autouse=True)
def run_store(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path / "outputs"))


def make_up(monkeypatch, notebook: str, rates: dict[str, float], seeds=None, profile="cpu") -> None:
    """Results for the arms of a notebook at a profile: each image right with its arm's probability."""
    setting = experiment(notebook, profile)
    made, hashes = {}, {}
    for seed in seeds or setting.profile.seeds:
        u = np.random.default_rng(seed).random(5000)  # common to all arms: paired
        for arm, rate in rates.items():
            spec = setting.arms[arm].spec.with_seed(seed)
            right = u < rate
            metrics = {"top1": 100 * right.mean(), "first_loss": 2.3, "train_loss": 0.5, "trained_params": 10}
            made[spec.hash] = Result(spec.hash, metrics, right, hashes, ABOUT)
    monkeypatch.setattr(store, "find", lambda spec: made.get(spec.hash))


@pytest.mark.parametrize(
    "notebook, profile, layer_scale, arm",
    [("31", "cpu", True, "12x1+LS"), ("31", "imagenet", True, "36x1+LS"), ("32", "imagenet", False, "W768 24x1"), ("34", "imagenet", False, "36x1"), ("33", "smoke", False, "4x1")],
)  # fmt: skip
def test_the_reference_arm_is_the_sequential_model_of_the_profiles_own_width(notebook, profile, layer_scale, arm):
    setting = experiment(notebook, profile)
    runs = Runs(setting, {arm: [] for arm in setting.arms})
    assert tables.sequential(runs, setting.profile.width, layer_scale) == arm
    assert tables.sequential(Runs(setting, {}), 64) == ""


def test_a_table_has_imagenet_v2_and_averaged_weights_where_the_runs_have_them(monkeypatch):
    make_up(monkeypatch, "31", {"12x1+LS": 0.84, "6x2+LS": 0.83})
    plain = runs_of("31", "cpu")
    assert not {*printed(tables.accuracies(plain, nothing("31"), "12x1+LS", {}))} & {*tables.BESIDE.values()}
    more = {arm: [replace(r, metrics=r.metrics | {"top1_v2": 71.0}) for r in rs] for arm, rs in plain.results.items()}
    more["6x2+LS"] = [replace(r, metrics=r.metrics | {"top1_ema": 80.0}) for r in more["6x2+LS"]]
    frame = tables.accuracies(Runs(plain.experiment, more), nothing("31"), "12x1+LS", {})
    assert list(frame["top1_v2 mean"]) == [71, 71] and frame["top1_ema mean"].isna().tolist() == [True, False]
    table = printed(frame)
    assert set(table["top1, ImageNet-V2"]) == {"71.00 ± 0.00 (n=5)"}
    assert list(table["top1, averaged weights (EMA)"]) == ["–", "80.00 ± 0.00 (n=5)"]


def transfer_rates(**of: float) -> dict[str, float]:
    """0.75 for each subset of each strategy of digits, unless told: attn=0.8."""
    return {arm: of.get(arm.split()[2].rstrip(","), 0.75) for arm in experiment("42", "study").arms}


def test_the_table_of_transfer_averages_subsets_within_a_seed_and_says_what_is_missing(monkeypatch):
    make_up(monkeypatch, "42", transfer_rates(attn=0.8), profile="study")
    runs = runs_of("42", "study")
    frame = tables.transfer(runs, nothing("42"))
    assert list(frame["measured"]) == ["committed reference: not run", "this run (study)"]
    row = frame.iloc[1]
    assert (row["data"], row["images"], row["width"], row["full n"]) == ("digits", 100, 64, 20)
    top1s = np.array([[r.metrics["top1"] for r in runs.results[f"digits 100 full, subset {k}"]] for k in (1, 2, 3)])
    assert row["full mean"] == pytest.approx(top1s.mean()) and row["full sd"] == pytest.approx(
        top1s.mean(0).std(ddof=1)
    )
    assert row["low"] <= row["points"] <= row["high"] and row["points"] == pytest.approx(5, abs=0.5)
    at_cpu = tables.transfer(Runs(experiment("42", "cpu"), {}), runs)
    assert list(at_cpu["measured"]) == ["committed reference", "this run (cpu): not run"]
    figure = figures.transfer_figure(frame)
    chart = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines[:3]}
    assert chart["ViT-S, the paper"] == pytest.approx([0.1, 0.1, -0.2, -1.4, -5.2, -7.4])
    assert [c.get_label() for c in figure.axes[0].containers] == ["digits, width 64, this run (study)"]


def test_nothing_trained_is_judged_at_smoke():
    for verdict in evidence.verdicts(evidence.Stored(profiles.profile("smoke"))):
        assert verdict.label == ("exact" if verdict.part.kind == "exact" else "not judged at smoke")


def test_labels_at_several_margins_are_printed_under_their_margins():
    part = ledger().part("A1").at_profile("study")
    verdict = Verdict(part, "study", "level within 0.5", Estimate(0.1, (0.01 * 20 * 5000, 1.0, 1.0), 20, 5000))
    row = tables.printed(tables.margins([verdict])).iloc[0].to_dict()
    assert row == {
        "part": "A1", "margin": "0.5", "tightest": "0.27", "at 0.3": "level within 0.3", "at 0.5": "level within 0.5",
        "at 1": "level within 1", "at 1.5": "level within 1.5",
    }  # fmt: skip
    assert tables.printed(tables.margins([])).empty


def test_gaps_are_two_branches_minus_one_by_size_without_layer_scale(monkeypatch):
    one = {f"W{width} 12x1": 0.80 for width in (32, 64)}
    make_up(monkeypatch, "32", one | {"W32 6x2": 0.78, "W64 6x2": 0.82}, seeds=(1000, 1001), profile="smoke")
    setting = experiment("32", "smoke")
    setting = replace(setting, profile=replace(setting.profile, seeds=(1000, 1001)))
    table = tables.gaps(setting.finished(), nothing("32"), "width")
    assert list(table["width"]) == [32, 64] and list(table["points"]) == pytest.approx([-2, 2], abs=0.6)
    assert (table["low"] <= table["points"]).all() and (table["points"] <= table["high"]).all()
    figure = figures.gap_figure(table, paper.gaps("figure2", "width"), "width")
    assert len(figure.axes) == 1 and "ImageNet, chart ± 0.1" in str(figure.axes[0].get_legend().texts[0])
    make_up(monkeypatch, "34", {"12x1": 0.8, "6x2": 0.81, "12x1+LS": 0.9, "6x2+LS": 0.8}, profile="study")
    assert list(tables.gaps(runs_of("34", "study"), nothing("34"), "pairs")["two"]) == ["6x2"]


def test_a_verdict_over_runs_that_read_different_files_says_so(monkeypatch, recwarn):
    make_up(monkeypatch, "31", {"12x1+LS": 0.84, "6x2+LS": 0.80})
    made = store.find

    def find(spec):
        result = made(spec)
        return result and replace(result, about=ABOUT | {"files": {"train": files[spec.model.branches == 1]}})

    monkeypatch.setattr(store, "find", find)
    for files in (("a", "a"), ("a", "b")):
        evidence.verdicts(evidence.Stored(profiles.profile("cpu")), number="31")
        assert any("different files of" in str(w.message) for w in recwarn) == (files == ("a", "b"))


def test_a_notebook_without_runs_at_a_profile_shows_the_committed_reference(monkeypatch):
    none, unknown = experiment("33", "cpu").finished(), nothing("33")
    gaps = tables.gaps(none, unknown, "pairs")
    assert none.results == {} and len(gaps) == 0
    assert figures.gap_figure(gaps, paper.gaps("figure3", "pairs"), "pairs").axes
    make_up(monkeypatch, "33", {"12x1": 0.80, "6x2": 0.81}, profile="study")
    committed = runs_of("33", "study")
    shown = printed(tables.accuracies(none, committed, "12x1", {}))
    assert shown.loc["6x2", "committed reference"] == "{:.2f} ± {:.2f} (n=10)".format(*top1(committed, "6x2"))
    assert (shown["top1, this run (cpu)"] == "not run").all()
    gaps = tables.gaps(none, committed, "pairs")
    assert set(gaps["measured"]) == {"committed reference"} and gaps.set_index("pairs")["points"].notna()[12]
    assert figures.gap_figure(gaps, paper.gaps("figure3", "pairs"), "pairs").axes
    assert figures.difference_figure(none, "", "x").texts[0].get_text() == "no runs at cpu"


def top1(runs: Runs, arm: str) -> tuple[float, float]:
    values = [r.metrics["top1"] for r in runs.results[arm]]
    return float(np.mean(values)), float(np.std(values, ddof=1))


def test_the_sizes_of_table_1_print_as_the_paper_prints_them_vit_l_with_layer_scale_only():
    table = counted.table1_sizes()
    wrong = table[table["same"] != "yes"]
    assert len(table) == 8 and wrong[["model", "scale"]].values.tolist() == [["ViT-L/16", "no"]]


def test_training_more_pairs_holds_more_memory_where_inference_holds_less():
    table = counted.form_memory()
    assert list(table["1 ratio"] < 1) == [False, False, True, True] and (table["paper ratio"] < 1).all()
    peaks = counted.inference_memory().set_index("model")
    assert list(peaks.index) == ["B12x1", "S48x1", "S24x2", "L24x1", "B36x1", "B18x2"]
    for kernel in ("explicit", "fused"):
        assert list(peaks[kernel].sort_values().index) == list(peaks["paper"].sort_values().index)
        assert (abs(peaks[kernel] / peaks["paper"] - 1) < 0.17).all()


def test_figures_are_the_same_file_twice(monkeypatch, tmp_path):
    make_up(monkeypatch, "41", {"trunk": 0.84, "full": 0.81, "attn": 0.805, "ffn": 0.76})
    from lab.report.notebook import open_page

    page, pictures = open_page("41", "cpu"), []
    found = runs_of("41", "cpu")
    for _ in range(2):
        page.figure(figures.difference_figure(found, "full", "x"), alt="words")
        folder = tmp_path / "outputs" / "cpu" / "figures"
        pictures.append([(folder / f"41_tab5_resolution.{kind}").read_bytes() for kind in ("png", "svg")])
    assert pictures[0] == pictures[1]


def test_reconstructions_stand_below_their_originals_and_a_table_says_how_much_of_the_codebook_is_used():
    recipe = replace(small.TOKENIZER, epochs=1)
    spec = RunSpec("tokenizer", DVAEConfig(16, 4, 1, vocabulary=32, width=8), "fashion-mnist", recipe, 1000, images=100)
    execute.execute(spec)
    figure, caption = figures.reconstruction_figure(spec)
    originals, decoded = np.array(figure.axes).reshape(2, 10)
    data = load_resized("fashion-mnist", "validation", 16)
    for label, (above, below) in enumerate(zip(originals, decoded, strict=True)):
        first = data.images[int((data.labels == label).nonzero()[0]), 0].numpy() / 255
        assert np.allclose(above.images[0].get_array(), first, atol=1e-6)
        assert not np.allclose(below.images[0].get_array(), first, atol=0.05)
    assert "validation images" in caption and "16 tokens an image, of 32" in caption
    frame = tables.codebook_use({spec: store.find(spec)})
    assert frame.loc[0, "used"] == store.find(spec).metrics["tokens_used"] * 32
    assert tables.printed(frame).loc[0, "tokens used, of 32"] == f"{frame.loc[0, 'used']:.0f}"


def test_tables_say_the_paper_beside_ours_with_n_and_interval(monkeypatch):
    make_up(monkeypatch, "41", {"trunk": 0.84, "full": 0.81, "attn": 0.805, "ffn": 0.76})
    runs = runs_of("41", "cpu")
    row = printed(tables.accuracies(runs, nothing("41"), "full", paper.resolution())).loc["attn"]
    assert row["paper (ImageNet)"] == "84.3" and row["committed reference"] == "not run"
    mean, sd = top1(runs, "attn")
    assert row["top1, this run (cpu)"] == f"{mean:.2f} ± {sd:.2f} (n=5)" and row["minus full, points"].startswith("-0.")
    names = ("paper", "digits", "chart")
    assert paper.branches()["36x1"] == dict(zip(names, (82.9, 1, " (chart)"), strict=True))
    assert (
        paper.branches()["18x2+LS"] == dict(zip(names, (83.8, 1, ""), strict=True)) and "12x1" not in paper.branches()
    )


def test_the_figures_two_peaks_are_met_exactly_by_what_is_counted_and_what_both_strategies_need_besides(monkeypatch):
    settings = [(224, "fused", "float32"), (384, "explicit", "float32"), (384, "explicit", "amp")]
    monkeypatch.setattr(counted, "SETTINGS", settings)
    for setting, row in zip(counted.SETTINGS, counted.figure4_memory().to_dict("records"), strict=True):
        batch, rest = row["batch apart"], row["rest"]
        assert row["counted"] + rest == pytest.approx(20_860)
        fixed, each = counted.memory_line("attn", *setting)
        assert fixed + batch * each + rest == pytest.approx(17_840)
        assert (rest < 5_000) == (row["least"] < 20) == (setting == (384, "explicit", "amp"))


def test_a_steps_rows_add_up_and_what_is_spared_is_a_fifth():
    table = counted.step_multiply_adds()
    for size, share in ((224, 21.436), (384, 19.873)):
        rows = table[table["image_size"] == size].set_index("kind").drop(columns="image_size")
        assert rows.drop(index="all").sum().to_numpy() == pytest.approx(rows.loc["all"].to_numpy(), abs=1e-4)
        assert rows.loc["all", "spared, % of the step"] == pytest.approx(share, abs=5e-4)


# ---- Printing


def test_only_a_layout_makes_text_and_a_missing_number_is_a_dash_or_the_next_form():
    frame = pd.DataFrame([{"mean": 84.187, "sd": 0.466, "n": 5}, {"mean": 33.15, "n": 1}, {}])
    layout = {"top1": ("{mean:.2f} ± {sd:.2f} (n={n:.0f})", "{mean:.2f} (n={n:.0f})", "not run"), "sd": "{sd:.1f}"}
    assert tables.printed(frame, layout).values.tolist() == [
        ["84.19 ± 0.47 (n=5)", "0.5"], ["33.15 (n=1)", "–"], ["not run", "–"],
    ]  # fmt: skip
    assert tables.printed(pd.DataFrame([{"a": 83.05, "digits": 2}]), {"a": "{a:.{digits}f}"}).values == [["83.05"]]
    assert list(tables.printed(pd.DataFrame(), layout)) == ["top1", "sd"]
    assert tables.markdown(tables.framed([{"x": 1500}], {"x": "{x:,}"})).splitlines()[-1] == "| 1,500 |"


TEXTS = {"arm", "model", "chart", "one", "two", "measured", "data", "stem", "training", "predicts", "norm", "act", "same",
         "strategy", "attention", "precision", "layer", "kind", "models", "in", "mode", "step", "case", "over"}  # fmt: skip


def test_frames_hold_numbers():
    texts = TEXTS | {
        "scale",
        "printed",
        "printed_params",
        "printed_gflops",
        "printed_name",
        "layer_scale",
        "remark",
        "source",
    }
    texts |= {"device", "confidence", "model_family", "procedure", "dataset"}
    stems = stems_at("study", {})
    frames = [
        tables.accuracies(stems, stems, "linear pretrained", paper.stems()), tables.table7(stems, stems, paper.stems()),
        tables.gaps(nothing("32"), nothing("32"), "width"), counted.arm_sizes(stems.experiment.arms),
        counted.table1_sizes(), counted.stem_sizes(),
        counted.step_multiply_adds(), counted.form_memory(),
        counted.splits(stems.experiment.arms), paper.baselines(), paper.forms(), paper.procedures(),
        paper.layer_scale(), paper.figure1(), paper.gaps("figure2", "width"), paper.transfer(), paper.throughput(),
    ]  # fmt: skip
    for frame in (frame for frame in frames if len(frame)):
        names = {c for c in frame if not pd.api.types.is_numeric_dtype(frame[c]) and not c.endswith(" chart")}
        assert names <= texts, names - texts
        assert len(tables.printed(frame)) == len(frame)


# ---- Table 7


def stems_at(profile: str, rates: dict[str, float]) -> Runs:
    """Made-up results of every arm of notebook 52: right with the rate of its arm, 0.7 unless told."""
    setting = experiment("52", profile)
    results = {}
    for arm in setting.arms:
        seeds = setting.profile.seeds[: setting.arms[arm].n]
        right = [np.random.default_rng(s).random(5000) < rates.get(arm, 0.7) for s in seeds]
        metrics = [{"top1": 100 * r.mean(), "first_loss": 2.3, "train_loss": 0.5, "trained_params": 1} for r in right]
        results[arm] = [Result("", m, r, {}, ABOUT) for m, r in zip(metrics, right, strict=True)]
    return Runs(setting, results)


def test_every_row_of_the_papers_table_7_is_an_arm_and_no_arm_is_without_a_row():
    configs = [paper.stem_config(name) for name in small.STEM_ARMS]
    ours = [(c.stem, c.norm, c.act, f"ViT-B{c.depth}") for c in configs]
    theirs = paper_table("table7")[["stem", "norm", "act", "model"]].itertuples(index=False, name=None)
    assert len(set(ours)) == len(ours) and set(ours) >= set(theirs)
    assert list(counted.stem_sizes()["stem"]) == list(small.STEM_ARMS)
    cells = {arm: f"{cell['paper']:.{cell['digits']}f}" for arm, cell in paper.stems().items()}
    assert len(cells) == 2 * 10 and (cells["linear+1 pretrained"], cells["local supervised"]) == ("83.26", "82.26")


def test_stem_sizes_say_where_they_are_not_the_papers():
    table = printed(counted.stem_sizes(profiles.PROFILES["study"]))
    apart = table["ours minus paper"][table["ours minus paper"] != "as printed"]
    assert dict(apart) == {"conv": "-0.03 %", "local": "+0.17 %"}
    assert table.loc["linear+1", "more than linear, W64-6x1/8"] == "+16.44 %"


def test_table_7_compares_each_stem_with_the_linear_one_under_the_same_training():
    runs = stems_at("study", {"hmlp pretrained": 0.75, "linear supervised": 0.6})
    table = printed(tables.table7(runs, nothing("52"), paper.stems()))
    assert list(table.index) == [*small.PRIMARY_STEMS, small.BLANKED]
    assert table.loc["hmlp", "top1 pretrained, paper"] == "83.43"
    assert table.loc["hmlp", "pretrained minus linear, points"].startswith(("+4.", "+5."))
    assert table.loc["conv", "supervised minus linear, points"].startswith(("+9.", "+10."))
    assert table.loc["conv", "pretrained minus linear, points"] == "+0.00 [+0.00, +0.00]"
    assert table.loc[small.BLANKED, "top1 supervised"] == "–"


def test_a_stem_that_is_not_run_here_shows_the_committed_reference_with_its_label():
    runs, committed = stems_at("cpu", {}), stems_at("study", {"conv pretrained": 0.65})
    del runs.results["conv pretrained"]
    assert printed(tables.table7(runs, nothing("52"), {})).loc["conv", "top1 pretrained"] == "–"
    table = printed(tables.table7(runs, committed, {}))
    said = "committed: {:.2f} ± {:.2f} (n=20)".format(*top1(committed, "conv pretrained"))
    assert table.loc["conv", "top1 pretrained"] == said and "committed" not in table.loc["hmlp", "top1 pretrained"]


def test_a_stem_that_the_paper_does_not_have_is_shown_with_a_dash_beside_it(monkeypatch):
    monkeypatch.setitem(small.STEM_ARMS, "conv-plain", {"stem": "conv", "stem_act": "none"})
    sizes = printed(counted.stem_sizes(profiles.PROFILES["study"]))
    assert sizes.loc["conv-plain", "paper, GFLOPs"] == "–" == sizes.loc["conv-plain", "ours minus paper"]
    assert sizes.loc["conv-plain", "params"] != "–" and "conv-plain pretrained" not in paper.stems()


def test_figure_6_has_a_point_a_stem_at_the_two_differences_to_linear():
    runs = stems_at("study", {"hmlp pretrained": 0.75, "linear supervised": 0.68})
    figure = figures.stem_figure(tables.table7(runs, nothing("52"), paper.stems()), "study")
    assert [cell.get_title() for cell in figure.axes] == ["the paper, ImageNet", "here, study"]
    (x,), (y,) = figure.axes[1].containers[0].lines[0].get_data()  # hmlp, the first stem after linear
    assert x == pytest.approx(2, abs=0.7) and y == pytest.approx(5, abs=0.7)
    across, up = (bars.get_segments()[0] for bars in figure.axes[1].containers[0].lines[2])
    assert across.mean(0) == pytest.approx([x, y]) and up.mean(0) == pytest.approx([x, y])  # the intervals are its own
    hmlp = next(line for line in figure.axes[0].lines if line.get_label() == "hmlp")
    assert np.concatenate(hmlp.get_data()) == pytest.approx([0.34, 0.38])


def test_a_page_without_a_tokenizer_says_so_and_imported_ones_have_their_table_alone(monkeypatch):
    from lab.report import notebook

    shown = []
    monkeypatch.setattr(notebook, "display", lambda what: shown.append(what.data))
    notebook.open_page("52", "cpu").tokenizers(stems_at("cpu", {}))
    legend = {
        name: tables.legend(profiles.PROFILES[name], notebook.reference_text(catalogue.notebook("52")))
        for name in ("cpu", "study")
    }
    assert shown == [legend["cpu"], "No discrete VAE at this profile: the targets are k-means tokens."]
    assert shown[0].startswith("**Profile `cpu`**: Fashion-MNIST") and "width 64, 12 pairs" in shown[0]
    shown.clear()
    metrics = {"tokens_used": 0.5, "perplexity": 30.0, "recon_mse": 0.01, "first_loss": 1.6, "train_loss": 0.2}
    monkeypatch.setattr(store, "find", lambda spec: Result(spec.hash, metrics, None, {}, ABOUT))
    notebook.open_page("52", "study").tokenizers(stems_at("study", {}))
    assert len(shown) == 2 and shown[0] == legend["study"]
    assert shown[1].count("dVAE-128x64/8") == 20 and "| 64 " in shown[1] and "| 25.5 " in shown[1]


def test_a_page_shows_the_second_study_where_that_has_runs_of_it_and_the_pilot_elsewhere(monkeypatch):
    from lab.report import notebook

    second = evidence.Archived(evidence.committed("pilot").folder, "study")  # the pilot's files under another name
    shown = {"31": second.archive.results("31")}
    monkeypatch.setattr(second.archive, "results", lambda number: shown.get(number, {}))
    monkeypatch.setattr(evidence, "reference", lambda: second)
    studies = {number: notebook.study_of(catalogue.notebook(number)).name for number in ("00", "31", "41")}
    assert studies == {"00": "study", "31": "study", "41": "pilot"}
    assert set(notebook.committed(catalogue.notebook("31")).results) == set(shown["31"])
    monkeypatch.setattr(evidence, "reference", lambda: None)
    assert notebook.study_of(catalogue.notebook("31")).name == "pilot"


# ---- Rendering

PYTHON3 = {"name": "python3", "display_name": "Python 3", "language": "python"}


def test_every_notebook_of_the_list_is_there_with_profile_as_its_parameter():
    for one in NOTEBOOKS:
        assert one.file.startswith(one.number) and render.source(one).is_file()
        parameters = papermill.inspect_notebook(str(render.source(one)))
        assert parameters["profile"]["inferred_type_name"] == "str"
        assert {one["inferred_type_name"] for one in parameters.values()} <= {*render.READ}  # --set reads them all


def test_a_notebook_that_fails_is_kept_apart_and_named(monkeypatch, tmp_path):
    monkeypatch.setattr(render, "source", lambda number: tmp_path / "broken.ipynb")
    cells = ['profile: str = "smoke"  # scale', "1 / 0"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = PYTHON3
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    target = tmp_path / "outputs" / "smoke" / "notebooks" / "broken.ipynb"
    with pytest.raises(render.NotebookFailed, match=r"broken\.ipynb stopped in cell .*ZeroDivisionError"):
        with render.kernel_environment():
            render._render(tmp_path / "broken.ipynb", target, {"profile": "smoke"}, "key")
    assert not target.exists() and (target.parent / "failed" / "broken.ipynb").is_file()
    assert [p for p in target.parent.iterdir() if p.name.startswith(".")] == []


def test_an_executed_notebook_is_current_until_something_that_it_shows_or_the_code_changes(monkeypatch, tmp_path):
    """The paper's numbers and the committed reference are in the notebooks beside the runs."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    for name in ("PAPER", "REFERENCE"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    names = (
        "PAPER/table1.csv",
        "REFERENCE/t.csv",
        "REFERENCE/runs.jsonl",
        "vitlib/a.py",
        "lab/report/b.py",
        "tools/c.py",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    keys = [render._content_key(render.source(catalogue.notebook("34")), {}, [])]
    assert render._content_key(render.source(catalogue.notebook("34")), {}, []) == keys[0]
    for name in names:
        (tmp_path / name).write_text("2")
        keys.append(render._content_key(render.source(catalogue.notebook("34")), {}, []))
    assert len(set(keys)) == 1 + len(names)


def test_notebook_parameters_are_checked_by_name_and_type(tmp_path):
    cell = nbformat.v4.new_code_cell(
        'profile: str = "smoke"  # scale\nshare: float = 0.5  # of it\nsteps: int = 3  # all'
    )
    cell.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": PYTHON3})
    nbformat.write(notebook, tmp_path / "n.ipynb")

    def chosen(*words):
        return render._parameters(tmp_path / "n.ipynb", {"profile": "cpu", "jobs": 2}, list(words))

    assert chosen("share=1e-3") == {"profile": "cpu", "share": 0.001}
    with pytest.raises(UsageError, match="did you mean 'share'"):
        chosen("shares=1")
    with pytest.raises(UsageError, match=r"parameter steps of n is of type int, which '3\.5' is not"):
        chosen("steps=3.5")
