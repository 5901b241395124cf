"""Rivals train what they say and nothing else, with the same training and their own grid."""

import pytest
import torch

from adaptlab import adapters, recipes
from adaptlab.bench import rivals
from adaptlab.bench.runs import BaseConfig, start_run
from adaptlab.bench.testbeds import Bed, Pairs, accuracy, digits, questions
from adaptlab.train import Training

LAYERS = ("q_proj", "fc1")
PREPARE = {"head": rivals.head("head"), "BitFit": rivals.bitfit(LAYERS),
           "LoRA": rivals.lora(2, LAYERS, also=("head",)), "full": rivals.full()}


@pytest.fixture(scope="module")
def bed():
    return digits(0, sizes=(64, 32))


@pytest.mark.parametrize("name", PREPARE)
def test_a_rival_changes_what_it_trains_and_nothing_else(bed, name):
    method = rivals.trained(PREPARE[name], Training(steps=2, batch_size=16), (1e-2,), device="cpu")
    with bed.fresh() as model:
        assert method.adapt(model, bed, 0, **method.grid[0]) is None
        own = dict(model.named_parameters())
        moved = {n for n, p in bed.model.named_parameters() if n in own and not torch.equal(
            p, own[n])}
        trains = {n for n, p in own.items() if p.requires_grad}
    head = {"head.weight", "head.bias"}
    if name == "full":
        assert trains == set(own) and moved == set(own)
    elif name == "BitFit":
        assert moved == trains and all(n.endswith(("q_proj.bias", "fc1.bias")) for n in moved)
    else:
        assert moved == head
        assert {n for n in trains if "adaptlab" not in n} == head
        assert bool(trains - head) is (name == "LoRA")


def test_the_rank_of_lora_is_nearest_to_a_count(bed):
    for rank in (1, 3):
        with bed.fresh() as model:
            rivals.lora(rank, LAYERS)(model, bed, 0)
            count = adapters.count_parameters(model)[0]
        per_rank = count // rank
        for near in (-0.4, 0, 0.4):
            assert rivals.lora_rank(bed.model, LAYERS, int(count + near * per_rank)) == rank
    assert rivals.lora_rank(bed.model, LAYERS, 1) == 1
    with pytest.raises(ValueError, match="count = 0"):
        rivals.lora_rank(bed.model, LAYERS, 0)


def test_settings_of_a_method_reach_its_preparation(bed):
    seen = []
    method = rivals.trained(lambda model, bed, seed, k: seen.append((seed, k)),
                            Training(steps=1), (1e-3, 1e-2), k=(1, 4), device="cpu")
    assert method.grid == [{"lr": lr, "k": k} for lr in (1e-3, 1e-2) for k in (1, 4)]
    with bed.fresh() as model:
        method.adapt(model, bed, 7, lr=1e-3, k=4)
    assert seen == [(7, 4)]


def test_a_language_model_learns_answers_and_long_runs_leave_checkpoints(tmp_path):
    torch.manual_seed(0)
    llama = recipes.tiny_llama(hidden_size=16, heads=2, kv_heads=1), recipes.byte_tokenizer()
    pairs = Pairs(tuple(f"{i} is" for i in range(12)), (" x",) * 12, "invented")
    bed = questions(pairs, pairs, 0, n_test=2, model=llama)
    run = start_run("lame", BaseConfig(), root=tmp_path)
    method = rivals.trained(rivals.lora(4, ("up_proj", "down_proj")), Training(
        steps=201, batch_size=2), (1e-2,), device="cpu", run=run, name="LoRA")
    with bed.fresh() as model:
        before = bed.test.log_likelihood(model, bed.tokenizer)[0].mean()
        method.adapt(model, bed, 0, lr=1e-2)
        assert bed.test.log_likelihood(model, bed.tokenizer)[0].mean() > before + 0.1
    assert (run.folder / "checkpoints" / "LoRA-invented-0-0.01").exists()
    with pytest.raises(ValueError, match="name"):
        rivals.trained(rivals.full(), Training(steps=1), (1e-2,), run=run)


def test_untouched_is_the_model_as_it_was_and_biases_must_be_there(bed):
    method = rivals.untouched()
    with bed.fresh() as model:
        assert method.adapt(model, bed, 0) is None and list(method.grid) == [{}]
        assert accuracy(model, bed.test) == accuracy(bed.model, bed.test)
    torch.manual_seed(0)
    bare = Bed(torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), None, None, None)
    with pytest.raises(ValueError, match="has a bias"):
        rivals.bitfit(("0",))(bare.model, bare, 0)
