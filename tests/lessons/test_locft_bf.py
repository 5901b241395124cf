"""LocFT-BF: what is selected, the loss, kept states, schedules, bad input, the experiment."""

import json

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, MixtralConfig, T5Config

import schemas
from adaptlab import evaluate, recipes
from adaptlab.bench.runs import launch
from adaptlab.editing.locft_bf import (
    Descent,
    EditRequest,
    LocFT,
    LocFTConfig,
    block_stack,
    edit_loss,
    evaluate_edits,
    proportional_layer,
    says,
    select_parameters,
)
from adaptlab.experiments import locft_bf as lab

TOKENIZER = recipes.byte_tokenizer()
EDITS = [EditRequest("Paris is in", "Peru"), EditRequest("Oslo lies in", "Chad", "where is Oslo:"),
         EditRequest("Rome: ", "Iraq again")]


def llama(**more):
    torch.manual_seed(0)
    return recipes.tiny_llama(layers=3, **more)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=3,
                                      n_head=2, bos_token_id=1, eos_token_id=2)).eval()


def delta(model, edits=EDITS, layer=1, **options):
    editor = LocFT(model, TOKENIZER, LocFTConfig(layer, **{"lr": 1e-3, "epochs": 3} | options))
    result = editor.edit(edits)
    editor.revert()
    return torch.cat([d.flatten() for d in result.delta.values()])


def test_names_match_by_components():
    model = recipes.tiny_llama(layers=12)
    assert all(k.startswith("model.layers.1.") for k in select_parameters(model, 1, "entire"))
    with pytest.raises(ValueError, match="not in block"):
        select_parameters(model, 1, "mlp.down")
    for layer in (-1, 12, 1.0, True):
        with pytest.raises(ValueError, match="layer"):
            select_parameters(model, layer)


def test_proportional_layer():
    assert proportional_layer(6, 28, 80) == 19
    assert all(0 <= proportional_layer(i, 7, 3) < 3 for i in range(7))
    with pytest.raises(ValueError, match="layer"):
        proportional_layer(7, 7, 3)


def test_loss_does_not_feel_padding():
    ids, mask = torch.randint(5, 9, (2, 6)), torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 3:5] = True
    logits = torch.randn(2, 6, 9)
    one = edit_loss(logits, ids, mask)
    pad = torch.nn.functional.pad
    for side in ((0, 3), (3, 0)):
        more = edit_loss(pad(logits, (0, 0, *side)), pad(ids, side), pad(mask, side))
        torch.testing.assert_close(more, one)
    with pytest.raises(ValueError, match="target"):
        edit_loss(logits, ids, torch.zeros_like(mask))
    with pytest.raises(ValueError, match="agree"):
        edit_loss(logits, ids, mask[:, :5])


@pytest.mark.parametrize("make, module", [(llama, "mlp.down_proj"), (llama, "entire"),
                                          (gpt2, "mlp.c_proj"), (gpt2, "entire")])
def test_kept_states_give_the_same_weights(make, module):
    model = make()
    kept, whole = (delta(model, module=module, cached=c) for c in (True, False))
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-4)


def test_only_the_chosen_change_and_revert_is_exact():
    model = llama(tie=True)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    editor = LocFT(model, TOKENIZER, LocFTConfig(1, lr=1e-3, epochs=3))
    result = editor.edit(EDITS)
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"] and result.n_steps == 3
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    editor.revert()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"epochs": 0}])
def test_nothing_asked_nothing_changed(options):
    for schedule in ("breadth_first", "depth_first"):
        assert not delta(llama(), schedule=schedule, **options).any()


def test_learned_batches_are_skipped():
    editor = LocFT(llama(), TOKENIZER, LocFTConfig(1, loss_threshold=1e9))
    result = editor.edit(EDITS)
    assert result.n_steps == 0 and len(result.history) == 1


def test_schedules_and_order():
    model = llama()
    one = [delta(model, EDITS[:1], schedule=s) for s in ("depth_first", "breadth_first")]
    assert torch.equal(*one)
    torch.testing.assert_close(delta(model), delta(model, EDITS[::-1]), rtol=0, atol=2e-4)
    df = [delta(model, e, schedule="depth_first") for e in (EDITS, EDITS[::-1])]
    assert (df[0] - df[1]).abs().max() > 5e-4


def test_small_steps_are_not_lost_in_bfloat16():
    model = llama().bfloat16()
    assert delta(model, lr=2e-5, epochs=25, loss_threshold=0.0).abs().max() > 1e-4


def test_a_failed_edit_leaves_the_model():
    model = llama()
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    editor = LocFT(model, TOKENIZER, LocFTConfig(1, lr=1e-2), loss_fn=lambda m, r: (
        m.model.layers[1].mlp.down_proj.weight.sum() * (
            float("nan") if not torch.equal(m.model.layers[1].mlp.down_proj.weight, before) else 1)
        + 1e3))
    with pytest.raises(ValueError, match="loss is nan"):
        editor.edit(EDITS)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


def test_bad_input():
    editor = LocFT(llama(), TOKENIZER, LocFTConfig(1))
    with pytest.raises(ValueError, match="empty"):
        editor.edit([])
    with pytest.raises(ValueError, match="one target"):
        editor.edit([EditRequest("a", "b"), EditRequest("a", "c")])
    with pytest.raises(ValueError, match="tokens with its target"):
        editor.edit([EditRequest("a" * 600, "b")])
    for prompt, target in (("", "b"), ("a", " ")):
        with pytest.raises(ValueError, match="not empty"):
            EditRequest(prompt, target)
    for wrong in ({"batch_size": 0}, {"epochs": -1}, {"lr": float("nan")},
                  {"lr": float("inf")}, {"schedule": "bf"}):
        with pytest.raises(ValueError):
            LocFTConfig(1, **wrong)
    bare = recipes.byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        LocFT(llama(), bare, LocFTConfig(1)).edit(EDITS)


def test_answers():
    assert evaluate.normalize_answer("The U.S.A.") == evaluate.normalize_answer("usa")
    assert evaluate.normalize_answer("x b") != evaluate.normalize_answer("xb")
    found = evaluate_edits(llama(), TOKENIZER, EDITS, max_new_tokens=2)
    assert len(found["reliability"]) == 3 and len(found["generalization"]) == 1


def test_parts_share_nothing():
    for seed in range(3):
        subjects = [{r.subject for part in lab.draw(seed, 30, p) for r in part} for p in (0, 1)]
        edits, others = lab.draw(seed, 30, 1)
        assert not subjects[0] & subjects[1]
        assert not {r.prompt for r in edits} & {r.prompt for r in others}
        known = {(f"s{s} r{r} is", f"o{o}") for s, r, o in lab.facts()}
        assert not {(r.prompt, r.target) for r in edits} & known


def test_one_seed_and_full(tmp_path, monkeypatch):
    cfg = lab.SMALL.replace(seeds=(0,), edits=5, lrs=(3e-3,), epochs=1)
    assert len(launch("locft_bf", cfg, root=tmp_path, progress=False).claims) == 5
    file = tmp_path / "edits.json"
    rows = [{"src": f"City {i} is in", "alt": "Peru", "rephrase": f"{i} is?"} for i in range(4)]
    rows += [{"prompt": "Oslo is in", "target_new": "Chad", "rephrase_prompt": "Oslo?"}]
    file.write_text(json.dumps([*rows, {"src": "Oslo is in", "alt": "Mali"}]))
    monkeypatch.setattr(lab.models, "load", lambda *a, **k: (llama(), TOKENIZER))
    monkeypatch.setattr(lab.suites, "mmlu", lambda source: [
        {"context": f"{i}?", "choices": [" A", " B"], "answer": i % 2} for i in range(4)])
    full = lab.FULL.replace(layer=2, epochs=1, source=str(file), edits=5, choices=2)
    report = launch("locft_bf", full, "full", root=tmp_path, progress=False)
    table = report.tables["questions"]
    assert list(table["method"].unique()) == ["before", "depth-first", "breadth-first, batch 1",
                                              "LocFT-BF"]
    sizes = table[table["method"] == "before"].groupby("figure").size().to_dict()
    assert sizes == {"capability": 2, "generalization": 5, "reliability": 5}
    assert len(report.claims) == 6 and lab.read_edits(str(file), 5)[4].target == "Chad"
    with pytest.raises(ValueError, match="different prompts"):
        lab.read_edits(str(file), 6)


def test_full_names_what_there_is(recorded):
    assert lab.FULL.model in schemas.MODELS
    assert len(lab.suites.mmlu(lab.FULL.mmlu)) > 0
    assert schemas.rows("cais/mmlu@all#test") >= lab.FULL.choices


def stack_of(config):
    with torch.device("meta"):
        return block_stack(AutoModel.from_config(config))


def test_one_stack_of_blocks():
    experts = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
                            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                            num_local_experts=8)
    assert stack_of(experts) == "layers"
    with pytest.raises(ValueError, match="two stacks"):
        stack_of(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    lists = torch.nn.ModuleDict({k: torch.nn.ModuleList([torch.nn.Linear(2, 2)]) for k in "ab"})
    for model in (lists, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="one list"):
            block_stack(model)


def test_quantised_weights_are_refused():
    model = llama()
    down = model.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        select_parameters(model, 1)
    del down.weight
    down.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="full precision"):
        select_parameters(model, 1)


def gradients(monkeypatch, **options):
    "What each step would descend along; no step is taken."
    found = []

    def step(descent, loss):
        found.append(torch.autograd.grad(loss, descent.weights)[0])
        descent.steps += 1
    monkeypatch.setattr(Descent, "step", step)
    delta(llama(), epochs=1, **options)
    return torch.stack(found)


def test_a_batch_of_all_has_the_mean_gradient(monkeypatch):
    whole = gradients(monkeypatch, batch_size=len(EDITS))
    single = gradients(monkeypatch, batch_size=1)
    assert len(whole) == 1 and len(single) == len(EDITS)
    torch.testing.assert_close(whole[0], single.mean(0), rtol=1e-4, atol=1e-7)


def test_last_prompt_token(monkeypatch):
    model, row = llama(), LocFT(llama(), TOKENIZER, LocFTConfig(1)).rows(EDITS[:1])[0]
    ids, n = row
    logp = model(input_ids=torch.tensor([ids])).logits[0, n - 1].log_softmax(-1)
    weight = model.model.layers[1].mlp.down_proj.weight
    by_hand, = torch.autograd.grad(-logp[ids[n:]].mean(), weight)
    found = []
    monkeypatch.setattr(Descent, "step", lambda d, loss: found.append(
        torch.autograd.grad(loss, d.weights)[0]))
    delta(model, EDITS[:1], epochs=1, last_prompt_token=True)
    torch.testing.assert_close(found[0], by_hand, rtol=1e-3, atol=1e-6)


def test_steps_below_the_rounding_of_bfloat16_add_up():
    "A weight of 1 in bfloat16 does not move by 1e-3 at once; 25 such steps count."
    plain, ours = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    adam = torch.optim.Adam([plain], lr=1e-3)
    descent = Descent([ours], [torch.ones(4)], LocFTConfig(0, lr=1e-3))
    for _ in range(25):
        adam.zero_grad()
        plain.sum().backward()
        adam.step()
        descent.step(ours.sum())
    assert (plain == 1).all()
    torch.testing.assert_close(ours.float(), torch.full((4,), 0.975), rtol=0, atol=4e-3)


def test_a_model_of_nan_is_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss is nan after 0 steps"):
        delta(model)


def test_an_unusual_pass_is_refused():
    "A model that scales its logits: the kept states would train something else."
    model = llama()
    model.register_forward_hook(lambda m, args, out: setattr(out, "logits", 3 * out.logits) or out)
    with pytest.raises(ValueError, match="cached=False"):
        delta(model)
    assert delta(model, cached=False).any()


def test_what_counts_as_said():
    assert says("the U.S.A.", "USA") and says("St. Louis. It is in", "St. Louis")
    assert not says("St. Paul", "St. Louis") and not says("Romeo", "Rome") and not says("", "Rome")
    assert says("Rome\nand more", "Rome") and not says("Rome and more", "Rome")
