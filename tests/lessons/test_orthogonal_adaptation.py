"""Orthogonal adaptation: bases, the layer, merging, crosstalk, files, bad input, full scale."""

import copy
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from gpu.unet import UNet
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptlab import adapter_files, adapters, recipes
from adaptlab.arithmetic.orthogonal_adaptation import (
    ConceptTokens, OrthogonalAdapterConfig, OrthogonalLinear, SharedBasis, add_orthogonal_adapter,
    attach_concepts, concept_of, crosstalk, functional_crosstalk, load_concept, merge_concepts,
    save_concept, to_peft, unmerge_concepts)
from adaptlab.bench import cost
from adaptlab.bench.runs import start_run
from adaptlab.experiments import orthogonal_adaptation as told
from adaptlab.experiments.orthogonal_adaptation import FULL, SMALL, SUBJECTS, experiment
from adaptlab.train import Training
from one_seed import UNDECIDED, goes_on


def net(seed=0, layer=nn.Linear):
    torch.manual_seed(seed)
    return nn.Sequential(layer(24, 16), nn.Tanh(), nn.Linear(16, 10))


def made(model, name, method="random", basis=None, r=4, seed=0, **options):
    "A concept with random A; the model is as it was."
    basis = basis or SharedBasis(3, ("a", "b", "c"))
    add_orthogonal_adapter(model, OrthogonalAdapterConfig(
        concept=name, r=r, basis=basis, method=method, **options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.trainable_parameters(model):
            p.copy_(torch.randn(p.shape, generator=g))
    found = concept_of(model)
    adapters.detach(model)
    return found


# the basis


def test_two_processes_draw_the_same():
    code = ("from adaptlab.arithmetic.orthogonal_adaptation import SharedBasis as S; b = S(5);"
            "print(b.fingerprint, b.indices(64, 6, 'dog', 'x').tolist(),"
            "b.matrix(64).double().sum().item())")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    b = SharedBasis(5)
    assert said.stdout.split() == (f"{b.fingerprint} {b.indices(64, 6, 'dog', 'x').tolist()} "
                                   f"{b.matrix(64).double().sum().item()}").split()


def test_names_layers_and_seeds_draw_otherwise():
    b = SharedBasis(0)
    first = b.columns(64, 8, "dog", "x")
    others = [b.columns(64, 8, "cat", "x"), b.columns(64, 8, "dog", "y"),
              SharedBasis(1).columns(64, 8, "dog", "x"), b.columns(64, 8, "dog", "x", "gaussian")]
    assert not any(torch.allclose(first, o, atol=1e-3) for o in others)
    assert len(set(b.indices(64, 8, "dog", "x").tolist())) == 8


@pytest.mark.parametrize("m, r", [(24, 4), (25, 5), (7, 1)])
def test_blocks_cover_the_basis_and_then_are_refused(m, r):
    names = tuple(f"c{k}" for k in range(m // r + 1))
    b = SharedBasis(0, names)
    B = torch.cat([b.columns(m, r, c, "x", "disjoint") for c in names[:-1]], 1)
    torch.testing.assert_close(B.T @ B, torch.eye(B.shape[1]), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=f"room for {m // r} concepts"):
        b.columns(m, r, names[-1], "x", "disjoint")


def test_what_a_basis_refuses():
    b = SharedBasis().register("dog")
    with pytest.raises(ValueError, match="registered already"):
        b.register("dog")
    for call, words in [(partial(b.columns, 8, 9, "dog", "x"), "give 1 to 8"),
                        (partial(b.columns, 8, 0, "dog", "x"), "give 1 to 8"),
                        (partial(b.columns, 8, 2, "cat", "x", "disjoint"), "no block"),
                        (partial(b.columns, 8, 2, "dog", "x", "best"), "method"),
                        (partial(b.indices, 8, 2, "dog", "x", "blocks"), "draws no columns"),
                        (partial(SharedBasis, -1), "seed"),
                        (partial(SharedBasis, 0, "dog"), "list of names"),
                        (partial(OrthogonalAdapterConfig, concept=""), "name")]:
        with pytest.raises(ValueError, match=words):
            call()


# the layer


@pytest.mark.parametrize("layer", [nn.Linear, lambda i, o: Conv1D(o, i)])
def test_the_formula_and_its_gradient_by_differences(layer):
    model = net(layer=layer).double()
    add_orthogonal_adapter(model, OrthogonalAdapterConfig(concept="a", r=3, target_modules=("0",)))
    own, x = adapters.adapters(model)["0"], torch.randn(5, 24, dtype=torch.float64)
    with torch.no_grad():
        own.up.normal_()
    W = adapters.FrozenLayer(model[0]).matrix()
    expected = x @ (W + own.up @ own.down).T + model[0].bias
    torch.testing.assert_close(model[0](x), expected)

    def loss(A):
        return (x @ (W + A @ own.down).T + model[0].bias).square().sum()

    model[0](x).square().sum().backward()
    step = torch.zeros_like(own.up)
    step[2, 1] = 1e-5
    slope = (loss(own.up + step) - loss(own.up - step)) / 2e-5
    torch.testing.assert_close(own.up.grad[2, 1], slope.detach(), rtol=1e-5, atol=1e-6)
    assert own.down.grad is None and not own.down.requires_grad


def test_training_leaves_base_and_columns_and_counts_half_of_lora():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add_orthogonal_adapter(model, OrthogonalAdapterConfig(concept="a", r=4))
    assert adapters.count_parameters(model)[0] == 4 * (16 + 10)
    down = [a.down.clone() for a in adapters.adapters(model).values()]
    x, y = torch.randn(64, 24), torch.randn(64, 10)
    Training(steps=20, batch_size=16, lr=0.05, weight_decay=0.5).fit(
        model, (x, y), lambda m, b: (m(b[0]) - b[1]).square().mean(), device="cpu", progress=False)
    for B, a in zip(down, adapters.adapters(model).values(), strict=True):
        assert torch.equal(a.down, B) and a.up.abs().max() > 0
    adapters.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_all_linear_leaves_the_head_of_a_language_model_out():
    llama = add_orthogonal_adapter(recipes.tiny_llama(), OrthogonalAdapterConfig(concept="a", r=2))
    found = set(adapters.adapters(llama))
    linear = {n for n, m in llama.named_modules() if type(m) is nn.Linear}
    assert found == linear - {"lm_head"}


# merging


@pytest.mark.parametrize("method", ["random", "disjoint", "gaussian"])
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_merge_in_any_order_and_back(method, dtype, near):
    model = net().to(dtype)
    parts = [made(model, c, method, seed=i) for i, c in enumerate("abc")]
    x, W = torch.randn(6, 24).to(dtype), model[0].weight.detach().clone()
    y0 = model(x)
    y = merge_concepts(model, parts, [0.2, -1.0, 0.6])(x)
    assert model[0].weight.dtype == dtype
    unmerge_concepts(model)
    assert torch.equal(model[0].weight, W) and torch.equal(model(x), y0)
    again = attach_concepts(model, parts[::-1], [0.6, -1.0, 0.2])(x)
    torch.testing.assert_close(again, y, rtol=near, atol=near)
    unmerge_concepts(model)
    default = W.float() + 0.6 * sum(p.up["0"] @ p.columns("0").T for p in parts)
    torch.testing.assert_close(merge_concepts(model, parts)[0].weight.float(), default, rtol=near,
                               atol=near)
    unmerge_concepts(model)


def test_same_columns_add_their_factors():
    model, basis = net(), SharedBasis(0)
    a, b = (made(model, "a", basis=basis, seed=k) for k in (0, 1))
    torch.testing.assert_close(
        a.up["0"] @ a.columns("0").T + b.up["0"] @ b.columns("0").T,
        (a.up["0"] + b.up["0"]) @ a.columns("0").T)


def test_what_does_not_belong_together_is_refused():
    model = net()
    a = made(model, "a")
    for wrong, words in [(made(model, "b", basis=SharedBasis(4)), "basis"),
                         (made(model, "b", r=3), "rank"), (made(model, "b", "gaussian"), "method"),
                         (made(model, "b", target_modules=("0",)), "layers"),
                         (made(model, "a", seed=1), "different concepts")]:
        with pytest.raises(ValueError, match=words):
            merge_concepts(model, [a, wrong])
    one, two = (made(model, c, "disjoint", SharedBasis(3, (c,))) for c in "ab")
    with pytest.raises(ValueError, match="same block"):
        merge_concepts(model, [one, two])
    for weights in (float("nan"), [1.0], [1.0, float("inf")], "ab", {"a": 1.0, "b": 1.0}):
        with pytest.raises(ValueError, match="finite"):
            merge_concepts(model, [a, made(model, "b")], weights)
    with pytest.raises(ValueError, match="other weights"):
        merge_concepts(net(seed=1), [a])
    with pytest.raises(ValueError, match="the model.s layers are"):
        merge_concepts(nn.Sequential(nn.Linear(24, 16)), [a])
    with pytest.raises(ValueError, match="inputs and outputs"):
        merge_concepts(nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10)), [a])
    with pytest.raises(ValueError, match="no merged concepts"):
        unmerge_concepts(model)
    assert not adapters.adapters(model)


def test_quantised_weights_are_not_merged_into():
    model = net()
    a = made(model, "a")
    model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="quantised"):
        merge_concepts(model, [a])
    assert not adapters.adapters(model)


def test_numbers_that_are_not_finite_and_models_with_no_concept():
    model = net()
    add_orthogonal_adapter(model, OrthogonalAdapterConfig(concept="a", r=2))
    with torch.no_grad():
        adapters.adapters(model)["0"].up[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        concept_of(model)
    adapters.detach(model)
    adapters.attach(model, partial(adapters.LoraAdapter, rank=2), ["0"])
    with pytest.raises(ValueError, match="must hold one concept"):
        concept_of(model)


def test_one_concept_and_weights_of_any_kind():
    model = net()
    a, b, x = made(model, "a"), made(model, "b", seed=1), torch.randn(3, 24)
    y = attach_concepts(model, [a], 0.5)(x)
    unmerge_concepts(model)
    torch.testing.assert_close(merge_concepts(model, a, torch.tensor(0.5))(x), y)
    unmerge_concepts(model)
    y = attach_concepts(model, [a, b], [0.5, 0.5])(x)
    unmerge_concepts(model)
    torch.testing.assert_close(attach_concepts(model, [a, b], np.float32(0.5))(x), y)


def test_a_wide_layer_is_known_by_its_entries_to_the_last():
    layer = nn.Linear(2**14, 2**11 + 1, bias=False, dtype=torch.bfloat16)  # over 2^24 entries
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[-1, -1] = 3.0
    assert told.adapters.FrozenLayer(layer).matrix().numel() > 2**25
    add_orthogonal_adapter(nn.Sequential(layer), OrthogonalAdapterConfig(
        concept="a", r=1, method="gaussian"))
    concept = concept_of(nn.Sequential(layer))
    assert concept.base["0"][-1] == 3.0 and concept.base["0"].count_nonzero() == 1


def test_what_was_trained_beside_the_factors_is_not_lost_in_silence():
    model = net()
    add_orthogonal_adapter(model, OrthogonalAdapterConfig(concept="a", r=2, target_modules=("0",)),
                           also_train=["2.bias"])
    with pytest.raises(ValueError, match="2.bias.*would be lost"):
        concept_of(model)
    assert "bias" in concept_of(model, {"bias": model[2].bias}).tokens


# crosstalk


@pytest.mark.parametrize("method", ["random", "disjoint", "gaussian"])
def test_crosstalk_by_small_matrices_is_that_of_dense_ones(method):
    model = net()
    a, b = made(model, "a", method), made(model, "b", method, seed=1)
    for layer, found in crosstalk(a, b).items():
        D, E = (c.up[layer] @ c.columns(layer).T for c in (a, b))
        dense = (D @ E.T).norm() / (D.norm() * E.norm())
        assert abs(found - dense) < 1e-6 and (method != "disjoint" or found < 1e-6)
    a.up["0"].zero_()
    assert crosstalk(a, b)["0"] == 0.0
    with pytest.raises(ValueError, match="different layers"):
        crosstalk(a, made(model, "b", target_modules=("0",)))


def test_functional_crosstalk_on_the_inputs_of_the_single_models():
    model = net().train()
    a, b = made(model, "a"), made(model, "b", seed=1)
    inputs = {"a": torch.randn(7, 24), "b": torch.randn(5, 24)}
    found = functional_crosstalk(model, [a, b], inputs)
    for i, c in enumerate((a, b)):
        h = torch.tanh(model[0](inputs[c.name]) + inputs[c.name] @ c.columns("0") @ c.up["0"].T)
        norms = [(h @ o.columns("2") @ o.up["2"].T).norm() for o in (a, b)]
        torch.testing.assert_close(found["2"][i], torch.stack(norms).detach() / norms[i].detach())
    assert model.training and not adapters.adapters(model)
    with pytest.raises(ValueError, match="no inputs"):
        functional_crosstalk(model, [a, b], {"a": inputs["a"]})


# files and tokens


def test_a_concept_on_disk(tmp_path, monkeypatch):
    model = net()
    a = made(model, "a", "disjoint")
    a.tokens["words"] = torch.randn(3, 2, 8)
    file = save_concept(a, tmp_path / "a.safetensors")
    again = load_concept(file)
    assert again.config == a.config and again.inputs == a.inputs
    assert torch.equal(again.tokens["words"], a.tokens["words"])
    assert all(torch.equal(again.up[k], v) for k, v in a.up.items())
    x = torch.randn(3, 24)
    y = merge_concepts(model, [a])(x)
    unmerge_concepts(model)
    assert torch.equal(merge_concepts(model, [again])(x), y)
    other = recipes.tiny_llama()
    adapters.attach(other, partial(adapters.LoraAdapter, rank=2), ["q_proj"])
    with pytest.raises(ValueError, match="no concept"):
        load_concept(adapter_files.save(other, tmp_path / "lora.safetensors"))
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole one"):
        load_concept(tmp_path / "half.safetensors")
    monkeypatch.setattr(SharedBasis, "columns", lambda self, m, r, *a: torch.ones(m, r))
    with pytest.raises(ValueError, match="comes out otherwise"):
        load_concept(file)


def test_the_cores_files_keep_an_adapter_and_notice_another_basis(tmp_path, monkeypatch):
    llama, ids = recipes.tiny_llama(), torch.randint(0, 260, (2, 5))
    base = copy.deepcopy(llama)
    add_orthogonal_adapter(llama, OrthogonalAdapterConfig(
        concept="a", r=2, method="disjoint", basis=SharedBasis(1, ("a",))))
    with torch.no_grad():
        for p in adapters.trainable_parameters(llama):
            p.normal_()
    file = adapter_files.save(llama, tmp_path / "a.safetensors")
    torch.testing.assert_close(adapter_files.load(copy.deepcopy(base), file)(ids).logits,
                               llama(ids).logits)
    monkeypatch.setattr(SharedBasis, "columns", lambda self, m, r, *a: torch.ones(m, r))
    with pytest.raises(ValueError, match="comes out otherwise"):
        adapter_files.load(base, file)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_loads_the_same_function(tmp_path):
    from peft import PeftModel

    llama, ids = recipes.tiny_llama(), torch.randint(0, 260, (2, 5))
    a, b = made(llama, "a"), made(llama, "b", seed=1)
    for concepts, weights in ((a, 1.0), ([a, b], [0.3, -0.7])):
        folder = tmp_path / str(weights)
        to_peft(llama, concepts, folder, weights)
        theirs = PeftModel.from_pretrained(copy.deepcopy(llama), folder)(ids).logits
        ours = attach_concepts(llama, [a] if concepts is a else concepts, weights)(ids).logits
        unmerge_concepts(llama)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    settings = json.loads((tmp_path / "1.0" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 4


def test_words_for_each_layer():
    words = ConceptTokens(torch.randn(2, 4), layers=3)
    places = torch.tensor([[-1, 1, 0], [0, -1, -1]])
    plain = torch.randn(2, 3, 4)
    read = words(plain, places)
    assert torch.equal(read[1, 0, 0], plain[0, 0])
    assert torch.equal(read[2, 1, 0], words.values[2, 0])
    read.sum().backward()
    assert torch.equal(words.values.grad, torch.tensor([2.0, 1])[None, :, None].expand(3, 2, 4))
    for wrong in (places + 1, places - 1):
        with pytest.raises(ValueError, match="2 words"):
            words(plain, wrong)
    with pytest.raises(ValueError, match="length, 4"):
        words(torch.randn(2, 3, 1), places)
    with pytest.raises(ValueError, match="words, d"):
        ConceptTokens(torch.randn(3, 2, 4), layers=3)
    assert words(plain[:0], places[:0]).shape == (3, 0, 3, 4)


# the experiment


def test_one_seed_and_a_run_that_goes_on(tmp_path, monkeypatch):
    cfg = SMALL.replace(seeds=(0,), steps=2)
    report = goes_on(told, cfg, tmp_path, monkeypatch, idle=(told, "train_concepts"))
    assert {c.verdict for c in report.claims} == UNDECIDED


def test_concepts_side_by_side_share_nothing():
    bed = told.concepts(7)
    alone = copy.copy(bed)
    alone.train = bed.train.clone()
    alone.train[1:] = 0.0  # other images for the others
    first, second = (told.train_concepts(b, 0, kind="LoRA", lr=1e-2, steps=3)
                     for b in (bed, alone))
    for layer, pair in first.changes.items():
        for ours, theirs in zip(pair, second.changes[layer], strict=True):
            torch.testing.assert_close(ours[0], theirs[0])
            assert not torch.allclose(ours[1], theirs[1])


def test_controls_have_the_columns_that_they_say():
    same, apart = (told._first_columns(k, 64, "x", 0) for k in ("same", "disjoint"))
    for B, shared in ((same, 8), (apart, 0)):
        norms = (B[0].T @ B[3]).square().sum()
        torch.testing.assert_close(norms, torch.tensor(float(shared)), rtol=0, atol=1e-4)


def test_tokens_inside_of_their_block_lose_nothing_by_merging():
    bed = told.concepts(7)
    made = told.train_concepts(bed, 0, kind="disjoint", lr=1e-2, start="own", steps=3)
    x, level = bed.test, torch.full(bed.test.shape[:2], 50)
    alone, five = (bed.model(x, level, made.tokens[:, None], told.merged(made, n).changes)
                   for n in (1, 5))
    torch.testing.assert_close(alone, five, rtol=0, atol=1e-4)
    places = told._places(made, bed.model)
    assert places["own share"] > 1 - 1e-4 and places["in function"] < 1e-4


def test_full_names_what_the_hub_has(recorded):
    assert set(FULL.subjects) == set(SUBJECTS) and len(SUBJECTS) == 12
    for name in SUBJECTS:
        assert told._photographs(name, 16).shape == (4, 3, 16, 16)
    assert FULL.rank == 20 and FULL.photo_training.lr == 1e-5 and FULL.photo_token_lr == 1e-3


def test_what_full_needs_was_counted():
    "The numbers of *Full scale*, on a U-Net of the shape of Stable Diffusion 1.5."
    with torch.device("meta"):
        unet = UNet()
        given = {"sample": torch.empty(2, 4, 64, 64), "timestep": torch.empty(2),
                 "context": torch.empty(2, 77, 768)}
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert cost.forward_flops(unet, given, 2) == pytest.approx(0.80e12, rel=0.01)
    linear = [m for m in unet.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 184 and sum(m.out_features for m in linear) * FULL.rank == 4_697_600


def test_full_scale_path_with_a_tiny_stable_diffusion(tmp_path, recorded):
    pytest.importorskip("diffusers")
    sd, clip = tiny_stable_diffusion(tmp_path)
    cfg = FULL.replace(model=sd, clip=clip, device="cpu", seeds=(0,), rank=4, side=64, samples=1,
                       subjects=("dog", "cat", "can"), draw_steps=2,
                       photo_training=Training(steps=2, batch_size=2, lr=1e-3))
    report = experiment(cfg, start_run("orthogonal_adaptation", cfg, "full", root=tmp_path / "r"))
    table = report.tables["photos"]
    assert len(table) == 6 and table["merged image"].between(-1, 1).all()
    assert set(recorded.asked) == {f"google/dreambooth@{s}#train" for s in cfg.subjects}


def tiny_stable_diffusion(folder):
    "Pipeline and CLIP of the same architecture, random."
    from diffusers import (
        AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel)
    from transformers import (
        CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel,
        CLIPTokenizer)

    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    vocabulary = [*letters, *[f"{c}</w>" for c in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                              model_max_length=77)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}
    text = CLIPTextConfig(vocab_size=54, bos_token_id=52, eos_token_id=53, **shape)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=8,
                        down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "sd")
    vision = shape | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision,
                         projection_dim=8)).save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder / "clip")
    return str(folder / "sd"), str(folder / "clip")


def test_an_adapter_of_a_whole_model_is_of_the_exported_kind():
    model = add_orthogonal_adapter(net(), OrthogonalAdapterConfig(concept="a", r=2))
    assert all(type(a) is OrthogonalLinear for a in adapters.adapters(model).values())
