"""What runs will cost on a GPU: multiply-adds, hours, memory and disk by hand, and where the rate is from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lab.bench import runner
from lab.cost import count, plan, work
from lab.cost.plan import gpu_cost, gpu_text, rate_of, rates
from lab.cost.work import Job
from lab.experiments import imagenet, profiles
from lab.runs.spec import RunSpec
from vitlib.errors import UsageError
from vitlib.model import ViT, vit_config
from vitlib.train.dvae import DVAEConfig
from vitlib.train.recipe import Recipe

torch.set_num_threads(1)
IMAGENET = 1_281_167
SMALL = vit_config("W64-5x2/4", image_size=16, num_classes=10, layer_scale=1e-4)
PLAIN = Recipe(epochs=2, batch_size=8, lr=1e-3)


@pytest.fixture(autouse=True)
def no_benchmarks_of_this_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("VITLIB_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(plan.paths, "REFERENCE", tmp_path / "reference")


def b12(**fields) -> Job:
    return replace(Job("supervised", vit_config("B12"), imagenet.supervised_recipe("B"), IMAGENET), **fields)


# ---- work


def test_vit_b_for_300_epochs_takes_what_a_pencil_says():
    # 17.564e9 multiply-adds forward, three times that a step, 2 FLOP each, 300 x 1,281,167 images, at 400 TFLOP/s
    by_hand = 17.564e9 * 3 * 2 * 300 * 1_281_167 / 400e12 / 3600
    cost = gpu_cost([b12()], "h100", rate=400)
    assert cost.hours == pytest.approx(by_hand, rel=2e-5) == pytest.approx(28.13, abs=5e-3)
    assert (cost.rows[0].images, cost.rows[0].forward_gmacs) == (384_350_100, pytest.approx(17.564, abs=5e-4))


def test_evaluation_is_one_forward_pass_and_with_an_average_of_weights_two():
    plain, one = work.flop(b12()), work.flop(b12(evaluated=50_000))
    assert one - plain == 2 * 50_000 * 17_563_828_224
    averaged = replace(b12(evaluated=50_000), recipe=replace(imagenet.supervised_recipe("B"), ema=0.9999))
    assert work.flop(averaged) - plain == 2 * (one - plain)


def test_activation_checkpointing_adds_a_forward_pass():
    assert work.step_macs(b12(checkpointing=True)) - work.step_macs(b12()) == work.forward_macs(b12())


def test_attention_alone_leaves_out_the_gradients_of_the_other_weights():
    T, D, layers = 197, 768, 12
    ffn, stem = layers * T * 8 * D * D, 196 * 768 * D  # a gradient by weights has as many multiply-adds as the forward
    attn = b12(strategy="attn")
    # The plain rule of three gives the stem a gradient by the images too, which nobody needs.
    assert 3 * work.forward_macs(attn) - work.step_macs(attn) == ffn + 2 * stem


def test_layer_scale_and_stochastic_depth_change_no_multiply_add():
    other = replace(b12(), model=vit_config("B12", layer_scale=1e-4, drop_path=0.1))
    assert work.step_macs(other) == work.step_macs(b12())


TOKENIZER = DVAEConfig(in_chans=3, **imagenet.TOKENIZER_MODEL)
BEIT = Job(
    "masked", vit_config("B12"), imagenet.BEIT_PRETRAINING, IMAGENET, masked=75, targets="dvae", tokenizer=TOKENIZER
)  # fmt: skip
P, W, V, PIXELS = 196, 256, 8192, 8 * 8 * 3
ENCODER = P * (PIXELS * W + 2 * (9 * W * W + W * W) + W * V)
DECODER = P * (2 * (9 * W * W + W * W) + W * PIXELS)


def test_masked_pretraining_predicts_masked_patches_and_runs_the_tokenizers_encoder():
    classes = 768 * 1000
    assert work.forward_macs(BEIT) == 17_563_828_224 - classes + 75 * 768 * V
    assert work.step_macs(BEIT) == 3 * work.forward_macs(BEIT) + ENCODER
    assert work.step_macs(replace(BEIT, targets="pixels", tokenizer=None)) == 3 * (
        17_563_828_224 - classes + 75 * 768 * 768
    )


def test_a_tokenizer_trains_with_the_product_of_soft_tokens_and_codebook():
    own = Job("tokenizer", TOKENIZER, imagenet.TOKENIZER, IMAGENET)
    assert work.step_macs(own) == 3 * (ENCODER + P * V * W + DECODER)


# ---- memory and disk


@pytest.mark.parametrize("strategy", ["full", "attn"])
@pytest.mark.parametrize("fields", [{}, {"pos": "relative", "pool": "mean"}, {"stem": "hmlp"}], ids=str)
def test_memory_is_that_of_the_whole_model_at_any_batch(strategy, fields):
    config = replace(vit_config("W64-5x2/4", image_size=16, num_classes=10), **fields)
    held = work.held(Job("finetune", config, PLAIN, 100, strategy=strategy))
    whole = count.memory(config, strategy, batch=7, precision="amp")
    assert held.fixed + 7 * held.an_image == whole.activations
    assert (held.weights, held.gradients, held.optimizer) == whole[:3] and held.ema == 0
    assert held.state + 7 * held.an_image == whole.total


def test_lamb_holds_what_adamw_does_sgd_half_of_it_and_an_average_the_weights_again():
    def held(**fields):
        return work.held(Job("supervised", SMALL, replace(PLAIN, **fields), 100))

    adamw, sgd, averaged = held(), held(optimizer="sgd"), held(ema=0.99)
    assert held(optimizer="lamb") == adamw
    assert sgd.optimizer == adamw.weights and adamw.optimizer > 2 * adamw.weights
    assert averaged.ema == adamw.weights and averaged.checkpoint == adamw.checkpoint + adamw.weights


def test_with_checkpointing_a_layer_more_keeps_its_input_alone():
    def image(depth):
        return work.held(Job("supervised", replace(SMALL, depth=depth), PLAIN, 100, checkpointing=True)).an_image

    assert image(9) - image(4) == 5 * SMALL.tokens * SMALL.width * 4
    assert image(9) < work.held(Job("supervised", replace(SMALL, depth=9), PLAIN, 100)).an_image / 2


def test_masked_pretraining_holds_a_predictor_and_a_mask_token_in_place_of_the_head():
    job = Job("masked", SMALL, PLAIN, 100, masked=6, targets="tokens")
    with torch.device("meta"):
        trunk = count.params(ViT(replace(SMALL, num_classes=0)))
    assert work.held(job).weights == 4 * (trunk + SMALL.width + (SMALL.width + 1) * 128)
    assert work.held(replace(job, masked=7)).an_image - work.held(job).an_image == 4 * 128 + 2 * SMALL.width


def test_disk_is_every_runs_weights_and_the_largest_checkpoint_twice():
    cost = gpu_cost([b12(), b12()], "h100")
    weights = 4 * 86_566_888
    tensors = sum(1 for _ in ViT(replace(SMALL, depth=12, branches=1, layer_scale=None)).parameters())
    checkpoint = 3 * weights + 4 * tensors  # AdamW counts the steps of every tensor
    assert cost.disk_gb * plan.GB == pytest.approx(2 * weights + 2 * checkpoint)
    named = gpu_cost([replace(b12(), data="fashion-mnist")], "h100")
    assert named.data_gb["fashion-mnist"] > 0
    assert named.disk_gb == pytest.approx(cost.disk_gb - weights / plan.GB + named.data_gb["fashion-mnist"])
    assert gpu_cost([replace(b12(), data="imagenet-1k")], "h100").data_gb == {"imagenet-1k": None}


def test_a_batch_goes_through_in_the_parts_of_its_spec_and_what_does_not_fit_is_said_in_one_sentence():
    held = work.held(b12())

    def row(device="h100", gpus=1, **fields):
        return gpu_cost([b12(**fields)], device, gpus=gpus).rows[0]

    for gpus, accumulate, parts, images in (
        (1, 1, 1, 2048),
        (1, 8, 8, 256),
        (4, 8, 2, 256),
        (8, 8, 1, 256),
        (16, 8, 1, 128),
    ):
        found = row(gpus=gpus, accumulate=accumulate)
        assert found.parts == parts and found.mem_gb * plan.GB == pytest.approx(held.state + images * held.an_image)
    # Statistics of batch norm: of as many images on any number of GPUs, 2048 / 8.
    norms = row(gpus=8, accumulate=8, model=vit_config("B12", stem="hmlp"))
    assert norms.parts == 8 and norms.mem_gb < row(gpus=8, accumulate=8).mem_gb / 2
    assert row(accumulate=8).fits and not row().fits and not row("rtx4090", accumulate=2).fits
    text = gpu_text(gpu_cost([b12(), b12(accumulate=8)], "h100"))
    assert "note: 1 of the runs do not fit 90% of a h100's 80 GB" in text and text.count("(does not fit)") == 1
    assert "fit 90%" not in gpu_text(gpu_cost([b12(accumulate=8)], "h100"))


PARTS = {  # by batch and image size: 2048 / 256, 1024 / 256, 512 / 128, 768 / 256, 512 / 512
    (2048, 224): 8, (1024, 224): 4, (512, 384): 4, (768, 224): 3, (512, 112): 1,
}  # fmt: skip


def test_profile_imagenet_has_as_many_images_at_once_in_all_arms_and_fits_one_gpu_of_80_gb():
    p = profiles.profile("imagenet")
    specs = plan.family(spec for arms in imagenet.ARMS.values() for spec in arms(p).values())
    for spec in specs:
        assert spec.accumulate == PARTS[spec.recipe.batch_size, spec.model.image_size], spec.model.name
    wide, deep, stems = imagenet.resolution(p), imagenet.branches(p), imagenet.stems(p)
    largest = [wide["L full"], wide["full"], deep["36x1+LS"], deep["S60x1"], stems["local pretrained"].parent]
    cost = gpu_cost(largest, "h100")
    assert all(row.fits for row in cost.rows) and max(row.mem_gb for row in cost.rows) > 0.85 * 80


# ---- which runs


TRUNK = RunSpec("supervised", replace(SMALL, in_chans=1), "fashion-mnist", PLAIN, seed=1000, images=50)
TUNED = replace(TRUNK, protocol="finetune", parent=TRUNK, strategy="attn")


def test_seeds_share_a_row_and_a_spec_that_two_ask_for_is_one_run():
    both = [spec.with_seed(seed) for seed in (1000, 1001) for spec in (TUNED, TUNED)]
    cost = gpu_cost(plan.family(both), "a100")
    assert [(row.kind.split(",")[0], row.runs) for row in cost.rows] == [("supervised", 2), ("finetune", 2)]
    assert cost.hours == pytest.approx(2 * gpu_cost(plan.family([TUNED]), "a100").hours)
    assert gpu_cost(both, "a100").rows[0].runs == 2


def test_a_spec_becomes_a_job_with_its_images_and_those_it_is_judged_on():
    job = work.job(TUNED)
    assert (job.images, job.seen, job.strategy, job.data) == (50, 100, "attn", "fashion-mnist")
    assert job.evaluated == 2000 and work.job(TUNED.with_seed(0)).evaluated == 5000
    assert work.job(TRUNK) == work.job(TRUNK.with_seed(1001))


# ---- the rate


def bench_row(device="NVIDIA H100 80GB HBM3", **fields) -> dict:
    row = {"case": "B12", "arm": "full", "time_s": 0.5, "gmacs": 100_000.0, "precision": "bfloat16", "kind": "cuda"}
    return row | {"device": device, "date": "2026-01-01"} | fields


def write_bench(folder, rows, name="finetune"):
    runner.write(folder / "bench" / f"{name}.csv", rows)


def test_a_rate_is_assumed_as_a_share_of_the_makers_peak_until_it_is_measured_or_given(tmp_path):
    assumed = rate_of("h100")
    assert (assumed.how, assumed.tflops) == ("assumed", pytest.approx(0.35 * 989)) and "35 %" in assumed.source
    assert rate_of("h100", utilisation=0.5).tflops == 494.5
    write_bench(tmp_path / "gpu", [bench_row(), bench_row(time_s=0.4), bench_row(time_s=10.0)])
    measured = rate_of("h100")
    assert (measured.how, measured.tflops) == ("measured", 400.0)  # 2 x 1e14 multiply-adds in the median 0.5 s
    assert "H100 80GB" in measured.source and "2026-01-01" in measured.source
    assert rate_of("a100").how == rate_of("h100", utilisation=0.35).how == "assumed"
    assert rate_of("h100", rate=123.0) == plan.Rate(123.0, "given", "by the caller")


def test_the_largest_step_counts_and_a_committed_one_where_there_is_no_other(tmp_path):
    write_bench(tmp_path / "reference" / "gpu", [bench_row(case="small", gmacs=1000.0), bench_row()])
    assert [rate.tflops for rate in rates("h100")] == [400.0, 4.0]
    write_bench(tmp_path / "gpu", [bench_row(time_s=0.25)])
    assert [rate.tflops for rate in rates("h100")] == [800.0, 400.0, 4.0]


NO_STEP = {
    "a processor": {"kind": "cpu"}, "float32": {"precision": "float32"}, "another library": {"arm": "12x1 timm"},
    "a part of the weights": {"arm": "attn"}, "another device": {"device": "NVIDIA A100-SXM4-80GB"},
    "not counted": {"gmacs": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("why", NO_STEP)
def test_only_full_training_steps_in_half_precision_on_that_device_are_a_rate(tmp_path, why):
    write_bench(tmp_path / "gpu", [bench_row(**NO_STEP[why])])
    assert rates("h100") == []


def test_devices_are_found_by_the_names_that_they_give_themselves(tmp_path):
    write_bench(
        tmp_path / "gpu", [bench_row(device="NVIDIA GeForce RTX 4090"), bench_row(device="Tesla V100-SXM2-32GB")]
    )
    assert len(rates("rtx4090")) == len(rates("v100")) == 1


REFUSED = {
    "unknown device 'h1000': allowed are v100, .*; did you mean 'h100'?": {"device": "h1000"},
    "rate is 0: allowed is a positive": {"rate": 0},
    "rate is -3.0: allowed": {"rate": -3.0},
    "utilisation is 0: allowed is a share": {"utilisation": 0},
    "utilisation is 1.5: allowed": {"utilisation": 1.5},
    "gpus is 0: allowed": {"gpus": 0},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_planned_with_is_refused_in_one_sentence(sentence):
    with pytest.raises(UsageError, match=sentence):
        gpu_cost([b12()], **({"device": "h100"} | REFUSED[sentence]))


# ---- the text


def test_the_text_has_the_formula_each_kind_of_run_the_sum_and_where_the_rate_is_from(tmp_path):
    cost = gpu_cost([b12(), b12(), b12(strategy="attn")], "h100", gpus=4)
    text = gpu_text(cost)
    assert text.startswith("GPU-hours = 2 x (images seen x step + images evaluated x forward) / rate / 3600")
    assert "rate of h100 = 346.1 TFLOP/s, assumed: 35 % of 989 TFLOP/s, the maker's peak (dense, bf16)" in text
    assert "GPU-hours each (assumed)" in text and "17.56" in text and "52.69" in text
    hours = f"{cost.hours:.3g}" if cost.hours < 100 else f"{cost.hours:,.0f}"
    assert f"3 runs, {hours} GPU-hours (assumed)" in text and f"{cost.hours / 4:.3g} hours on 4 h100 (assumed)" in text
    write_bench(tmp_path / "gpu", [bench_row()])
    text = gpu_text(gpu_cost([b12()], "h100"))
    assert "assumed" not in text and text.count("(measured)") == 4 and "400 TFLOP/s, measured: bench finetune" in text


def test_a_precision_that_the_rate_does_not_hold_for_is_noted():
    assert gpu_cost([b12(accumulate=8)], "h100").notes == ()
    assert "1 of the runs are in float32" in gpu_text(gpu_cost([b12(precision="float32")], "h100"))
    assert "1 of the runs are in bf16, which a v100" in gpu_text(gpu_cost([b12()], "v100"))


def test_no_runs_cost_nothing():
    cost = gpu_cost([], "h100")
    assert (cost.hours, cost.mem_gb, cost.disk_gb) == (0, 0, 0) and "0 runs" in gpu_text(cost)
