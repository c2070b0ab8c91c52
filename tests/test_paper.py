"""The paper's own numbers in outputs/paper/*.csv: complete, sourced, and consistent wherever they can be recomputed."""

import re

import pandas as pd
import pytest

from lab import paths
from lab.claims.exact import size
from lab.claims.statistics import prints_as
from lab.data.cards import read_card
from lab.paper import paper_table
from vitlib.errors import UsageError
from vitlib.model import vit_config

ROWS = {
    "table1": 8, "table2": 8, "table3": 6, "table4": 14, "table5": 12, "table6": 18, "table7": 10, "table8": 24, "table9": 7,
    "figure1": 12, "figure2": 8, "figure3": 14, "figure4": 3, "figure6": 8, "disagreements": 27,
}  # fmt: skip
KEYS = {
    "table1": ["model", "epochs"], "table2": ["model", "epochs", "layer_scale"], "table3": ["model"],
    "table4": ["model", "batch"], "table5": ["model", "dataset", "optimizer"], "table6": ["model", "dataset"],
    "table7": ["stem", "norm", "act", "model"], "table8": ["procedure", "model"], "table9": ["dataset"],
    "figure1": ["model"], "figure2": ["model"], "figure3": ["model"], "figure4": ["panel"],
    "figure6": ["stem", "quantity"], "disagreements": ["quantity"],
}  # fmt: skip
EMPTY = {  # cells of numbers that the paper does not have, by table and column
    ("table2", "top1"): 1, ("table2", "top1_v2"): 1, ("table7", "supervised_sd"): 6, ("table7", "pretrained_sd"): 6,
    ("table8", "epochs"): 5, ("table8", "top1"): 5, ("table8", "top1_sd"): 23,
}  # fmt: skip


def numbers(name: str, key: list[str] | str) -> pd.DataFrame:
    """A table with numbers as numbers (empty: nan), by the given columns."""
    table = paper_table(name).set_index(key)
    return table.apply(lambda cells: pd.to_numeric(cells.replace("", None), errors="coerce"))


def test_there_is_a_file_for_every_table_and_chart():
    assert {path.stem for path in paths.PAPER.glob("*.csv")} == {*ROWS, "elsewhere"}  # the last is what others measured
    assert paper_table("elsewhere")[["source", "caveat", "confidence"]].ne("").all(axis=None)
    with pytest.raises(UsageError, match="did you mean 'table9'"):
        paper_table("table99")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_there_once_with_source_and_confidence(name):
    table = paper_table(name)
    assert len(table) == ROWS[name] and not table.duplicated(KEYS[name]).any()
    sources = [column for column in table.columns if column.endswith("source")]
    assert "source" in sources and table[sources].isin(["A", "B"]).all(axis=None)
    assert table["confidence"].isin(["read", "read-chart", "computed"]).all()
    assert (table.map(str.strip) == table).all(axis=None)
    if name.startswith("table"):
        assert (table["confidence"] == "read").all()  # typeset
    if name in ("figure1", "figure2", "figure3", "figure4"):
        assert (table["confidence"] == "read-chart").all()


@pytest.mark.parametrize("name", ROWS)
def test_a_cell_is_empty_only_where_the_paper_has_no_number(name):
    table = paper_table(name).drop(columns="remark", errors="ignore")
    found = {(name, column): count for column, count in (table == "").sum().items() if count}
    assert found == {place: count for place, count in EMPTY.items() if place[0] == name}


@pytest.mark.parametrize("name", ROWS)
def test_models_that_vitlib_can_build_are_named_so_that_it_reads_them(name):
    table = paper_table(name)
    if "model" not in table or table["model"].str.startswith("ViT-").all():
        return
    for row in table.to_dict("records"):
        config = vit_config(row["model"])
        for column in {"branches", "pairs", "depth", "width", "heads"} & set(row):
            assert str(getattr(config, column)) == row[column], row


# ---- Table by table ----


@pytest.mark.parametrize("name", ["table1", "table3"])
def test_parameters_and_flops_are_as_printed(name):
    for row in paper_table(name).to_dict("records"):
        # Table 1 has one size for both settings; of ViT-L it is the one with LayerScale.
        scale = row["layer_scale"] == "yes" or (name, row["model"]) == ("table1", "L24")
        counted = size(vit_config(row["model"], layer_scale=1e-4 if scale else None))
        assert prints_as(counted.params / 1e6, row["params_m"]), row
        assert prints_as(counted.macs / 1e9, row["gflops"]), row
    assert prints_as(size(vit_config("L24")).params / 1e6, "304.3")  # what the remark in Table 1 says


def test_table_1_says_the_same_of_a_model_in_both_settings():
    table = paper_table("table1")
    same = ["printed_name", "depth", "width", "heads", "params_m", "gflops", "images_per_s"]
    assert (table.groupby("model")[same].nunique() == 1).all(axis=None)
    assert set(zip(table["epochs"], table["layer_scale"], strict=True)) == {("300", "no"), ("400", "yes")}
    longer = numbers("table1", ["epochs", "model"])
    assert (longer.loc["400", ["top1", "top1_v2"]] > longer.loc["300", ["top1", "top1_v2"]]).all(axis=None)


def test_table_2_keeps_the_missing_row_and_agrees_with_table_3():
    table = paper_table("table2").set_index(["model", "epochs", "layer_scale"])
    assert len(set(table.index)) == 2 * 2 * 2
    missing = table[(table[["top1", "top1_v2"]] == "").any(axis=1)]
    assert list(missing.index) == [("B36x1", "400", "yes")]
    assert (missing[["top1", "top1_v2"]] == "").all(axis=None) and "no such row" in missing["remark"].item()
    assert "tick" in table.loc[("B18x2", "300", "no"), "remark"]
    table3 = paper_table("table3").set_index("model")
    for model in ("B36x1", "B18x2"):
        both = [list(t[["top1", "top1_v2"]]) for t in (table.loc[(model, "300", "yes")], table3.loc[model])]
        assert both[0] == both[1]


def test_table_3_has_five_percent_more_memory_for_branches():
    memory = numbers("table3", "model")["peak_mem_mb"]
    more = [100 * (memory[two] / memory[one] - 1) for one, two in (("S48x1", "S24x2"), ("B36x1", "B18x2"))]
    assert [f"{percent:.1f}" for percent in more] == ["5.3", "4.8"]


def test_table_4_gains_are_best_over_seq_within_rounding():
    for row in numbers("table4", ["model", "batch"]).itertuples():
        seq, best, gain = row.seq_images_per_s, row.best_images_per_s, row.gain_percent
        assert best == max(seq, row.par_images_per_s)
        low, high = 100 * ((best - 0.5) / (seq + 0.5) - 1), 100 * ((best + 0.5) / (seq - 0.5) - 1)
        assert low - 0.5 <= gain <= high + 0.5, row
        assert (gain == 0) == (best == seq), row
    slower = numbers("table4", ["model", "batch"]).query("batch in ('16', '32', '64')")
    share = 100 * (1 - slower["par_images_per_s"] / slower["seq_images_per_s"])
    assert (share.round().min(), share.round().max()) == (9, 13)


def test_table_5_attention_alone_beats_the_ffns_alone_everywhere():
    table = numbers("table5", ["model", "dataset", "optimizer"])
    ahead = (table["attn"] - table["ffn"]).round(1)
    assert (ahead.min(), ahead.max()) == (0.1, 1.1)


def test_table_6_attention_minus_full():
    table = numbers("table6", ["dataset", "model"])
    found = (table["attn"] - table["full"]).round(1).unstack().to_dict("index")
    wanted = {
        "inaturalist-2018": (-7.4, -3.0, -0.6), "inaturalist-2019": (-5.2, -2.5, -1.0), "cifar-10": (-0.2, -0.1, -0.1),
        "cifar-100": (-1.4, -0.7, -0.5), "stanford-cars": (0.1, 0.1, 0.0), "flowers-102": (0.1, 0.7, 0.1),
    }  # fmt: skip
    assert found == {d: dict(zip(("ViT-S", "ViT-B", "ViT-L"), row, strict=True)) for d, row in wanted.items()}


def test_table_7_hmlp_minus_linear():
    table = numbers("table7", ["stem", "norm", "act", "model"])[["supervised_top1", "pretrained_top1"]]
    linear, b13 = (table.loc[("linear", "none", "none", model)] for model in ("ViT-B12", "ViT-B13"))
    bn, ln = (table.loc[("hmlp", norm, "gelu", "ViT-B12")] for norm in ("bn", "ln"))
    gains = [list((a - b).round(2)) for a, b in ((bn, linear), (ln, linear), (bn, b13))]
    assert gains == [[0.34, 0.38], [0.30, 0.19], [0.19, 0.17]]


def test_table_8_repeats_table_1():
    table8 = paper_table("table8").set_index(["procedure", "model"])
    for row in paper_table("table1").to_dict("records"):
        procedure = "this paper + LayerScale" if row["layer_scale"] == "yes" else "this paper"
        other = table8.loc[(procedure, row["printed_name"].removesuffix("/16"))]
        assert (other["epochs"], other["top1"]) == (row["epochs"], row["top1"])
    assert ((table8["epochs"] == "") == (table8["top1"] == "")).all()
    assert set(table8.index[table8["epochs"] == "200"]) == {("He et al.", "ViT-L"), ("He et al. + EMA", "ViT-L")}


def test_table_9_and_the_data_cards_agree():
    """The paper trains on everything but its test split, which is `validation` where the test labels are not public."""
    table = numbers("table9", "dataset")
    assert set(paper_table("table6")["dataset"]) == set(table.index) - {"imagenet-1k"}
    for name, row in table.iterrows():
        path = paths.DATA_CARDS / f"{name}.md"
        own, splits = read_card(path)["vitlib"], read_card(path)["dataset_info"]["splits"]
        assert (own["sizes"]["train"][0], own["sizes"]["test"][0]) == (row["train_images"], row["test_images"])
        assert own["num_classes"] == row["classes"]
        splits = {split["name"]: split["num_examples"] for split in splits}
        test = splits.pop("test" if "test" in splits else "validation")
        assert (sum(splits.values()), test) == (row["train_images"], row["test_images"])
        assert f"\n{row['classes']:,.0f} classes.\n" in path.read_text(encoding="utf-8")
    assert numbers("table9", "dataset").loc["inaturalist-2019", ["train_images", "test_images"]].sum() == 268_243


def test_every_card_says_in_its_text_what_its_splits_hold():
    for path in paths.DATA_CARDS.glob("*.md"):
        for split in read_card(path)["dataset_info"]["splits"]:
            assert f"| `{split['name']}` | {split['num_examples']:,} |" in path.read_text(encoding="utf-8")


# ---- Charts ----


def test_figures_1_to_3_name_models_of_their_family_with_equal_pairs():
    for name, pairs in (("figure1", r"ViT-[SB](\d+)"), ("figure2", None), ("figure3", None)):
        for row in paper_table(name).to_dict("records"):
            config = vit_config(row["model"])
            wanted = re.fullmatch(pairs, row["model_family"])[1] if pairs else row.get("pairs", "24")
            assert str(config.pairs) == wanted and str(config.branches) == row["branches"]
            assert row["model_family"].startswith(
                "ViT-" + row["model"].removesuffix(f"{config.depth}x{config.branches}")
            )


def test_charts_lie_within_their_accuracy_of_the_tables():
    """0.1 point in Figures 1 to 3, 0.13 in Figure 6 (its linear stem)."""
    printed = {("B12x1", "no"): "82.2"} | {
        (row.model, row.layer_scale): row.top1
        for name in ("table2", "table3")
        for row in paper_table(name).itertuples()
        if getattr(row, "epochs", "300") == "300"
    }
    compared = 0
    for name in ("figure1", "figure2", "figure3"):
        for row in paper_table(name).itertuples():
            key = (row.model, getattr(row, "layer_scale", "no"))
            if key in printed:
                compared += 1
                assert abs(float(row.top1) - float(printed[key])) < 0.101, row
    assert compared == 8
    table = numbers("table7", ["stem", "norm", "act", "model"])
    chart = numbers("figure6", ["stem", "quantity"])["value"]
    for stem, norm, act in (("linear", "none", "none"), ("conv", "bn", "gelu"), ("hmlp", "bn", "gelu")):
        for column in ("supervised_top1", "pretrained_top1"):
            assert abs(chart[stem, column] - table.loc[(stem, norm, act, "ViT-B12"), column]) < 0.131


def test_the_60_pairs_of_figure_3_are_figure_1s():
    figure1, figure3 = (paper_table(name).set_index("model") for name in ("figure1", "figure3"))
    at_60 = figure3[figure3["pairs"] == "60"]
    assert at_60["remark"].str.contains("52").all() and (figure3["remark"] != "").sum() == 2
    assert dict(at_60["top1"]) == {model: figure1.loc[model, "top1"] for model in ("S60x1", "S30x2")}


# ---- Where the paper disagrees with itself ----


def test_disagreements_are_two_different_numbers_each_with_its_place():
    table = paper_table("disagreements")
    assert (table["first"] != table["second"]).all()
    assert (table["first_place"] != table["second_place"]).all()


def test_disagreements_quote_the_tables():
    said = paper_table("disagreements").set_index("quantity")
    cells = {
        name: paper_table(name).set_index(key)["top1"]
        for name, key in (("figure1", "model"), ("figure2", "model"), ("figure3", "model"), ("table3", "model"))
    }
    cells["table2"] = paper_table("table2").query("epochs == '300' and layer_scale == 'no'").set_index("model")["top1"]
    for quantity, first, second in (
        ("top-1 of B18x2, 300 epochs, no LayerScale", ("figure1", "B18x2"), ("table2", "B18x2")),
        ("top-1 of B18x2, 300 epochs, no LayerScale", ("figure3", "B18x2"), ("table2", "B18x2")),
        ("top-1 of L24x1 with LayerScale, 300 epochs", ("figure2", "L24x1"), ("table3", "L24x1")),
        ("top-1 of B12x1, 300 epochs", ("figure3", "B12x1"), ("table3", "B12x1")),
        ("top-1 of B24x1", ("figure2", "B24x1"), ("figure3", "B24x1")),
        ("top-1 of B12x2", ("figure2", "B12x2"), ("figure3", "B12x2")),
        ("top-1 of S18x2", ("figure1", "S18x2"), ("figure3", "S18x2")),
    ):
        assert list(said.loc[quantity, ["first", "second"]]) == [cells[name][model] for name, model in (first, second)]
    figure4 = paper_table("figure4").set_index("panel")
    for panel, word in (("latency", "time"), ("peak memory", "peak memory"), ("parameters", "weights")):
        row = said.loc[f"{word} saved by tuning attention alone, percent"]
        assert list(row[["first", "second"]]) == list(figure4.loc[panel, ["text_percent", "saving_percent"]])


def test_disagreements_quote_single_cells():
    said = paper_table("disagreements").set_index("quantity")[["first", "second"]]
    t7 = paper_table("table7").query("model == 'ViT-B12'").set_index(["stem", "norm", "act"])
    linear, conv, hmlp = t7.loc["linear", "none", "none"], t7.loc["conv", "bn", "gelu"], t7.loc["hmlp", "bn", "gelu"]
    t1, t3 = paper_table("table1").query("epochs == '300'").set_index("model"), paper_table("table3").set_index("model")
    t8 = paper_table("table8").set_index(["procedure", "model"])["top1"]
    figure6 = paper_table("figure6").set_index(["stem", "quantity"])["value"]
    gain = float(hmlp["pretrained_top1"]) - float(linear["pretrained_top1"])
    for quantity, first, second in (
        ("top-1 on ImageNet-V2 of ViT-B12, 300 epochs", t1.loc["B12", "top1_v2"], t3.loc["B12x1", "top1_v2"]),
        ("top-1 on ImageNet-V2 of ViT-B12, 300 epochs", t1.loc["B12", "top1_v2"], linear["supervised_v2"]),
        ("gain of the hMLP stem after masked pre-training, points", "0.3", f"{gain:.2f}"),
        ("top-1 of ViT-B12 with the linear stem, supervised", figure6["linear", "supervised_top1"], linear["supervised_top1"]),
        ("top-1 of ViT-B12 with the convolutional stem, supervised", figure6["conv", "supervised_top1"], conv["supervised_top1"]),
        ("top-1 of ViT-B12 with the hMLP stem, supervised", figure6["hmlp", "supervised_top1"], hmlp["supervised_top1"]),
        ("top-1 of ViT-B12 with the hMLP stem, pre-trained", figure6["hmlp", "pretrained_top1"], hmlp["pretrained_top1"]),
        ("top-1 of ViT-S, 300 epochs: this recipe against DeiT's", t8["this paper", "ViT-S"], t8["DeiT", "ViT-S"]),
    ):  # fmt: skip
        assert list(said.loc[quantity]) == [first, second], quantity


def test_disagreements_about_table_5_are_all_that_lie_beyond_a_tenth():
    """Each (model, optimizer, set) whose attn - full is outside the +-0.1 that the text gives, and no other."""
    table = numbers("table5", ["model", "optimizer", "dataset"])
    beyond = (table["attn"] - table["full"]).round(1)
    beyond = beyond[beyond.abs() > 0.1]
    rows = paper_table("disagreements").query("quantity.str.startswith('attention alone minus full')")
    said = {tuple(row.quantity.split(", ")[1:4]): float(row.second) for row in rows.itertuples()}
    assert said == beyond.to_dict() and (rows["first"] == "+-0.1").all()


def test_disagreements_about_stems_follow_from_table_7():
    flops = numbers("table7", ["stem", "norm", "act", "model"])["gflops"]
    linear, hmlp = flops["linear", "none", "none", "ViT-B12"], flops["hmlp", "bn", "gelu", "ViT-B12"]
    conv = flops["conv", "bn", "gelu", "ViT-B12"]
    said = paper_table("disagreements").set_index("quantity").loc["more FLOPs with the convolutional stem, percent"]
    assert prints_as(100 * (conv / linear - 1), said["second"]) and prints_as(100 * (conv / hmlp - 1), "7.6")
    assert (
        said["first"]
        == paper_table("figure6").set_index(["stem", "quantity"]).loc[("conv", "more_flops_percent"), "value"]
    )
    assert "7.6" in said["remark"]
