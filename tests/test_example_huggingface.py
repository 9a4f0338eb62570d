"""examples/huggingface: transformers' models with a mapping of this package in their attention."""

import copy
import sys

import pytest
import torch
from conftest import load_script

# Beside a torch for CPUs PyPI's torchvision and torchaudio do not load; transformers can do without them.
with pytest.MonkeyPatch.context() as patch:
    for name in ("torchvision", "torchaudio"):
        patch.setitem(sys.modules, name, None)
    pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5: pip install transformers")
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

example = load_script("mapped")

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, **SIZES}
MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **SIZES)),
    "bert": (BertForMaskedLM, BertConfig(**SMALL)),
    "llama": (LlamaForCausalLM, LlamaConfig(num_key_value_heads=2, **SMALL)),  # its heads share keys
}
TOKENS = torch.randint(1, 50, (3, 20), generator=torch.Generator().manual_seed(1))
PRESENT = (torch.arange(20) >= torch.tensor([[0], [3], [9]])).long()  # padding stands on the left


@pytest.fixture(params=MODELS)
def stock(request):
    model_class, config = MODELS[request.param]
    return model_class(copy.deepcopy(config)).eval()


def with_mapping(stock, folder, **mapping):
    """The weights of ``stock`` in a model with a mapping, by way of its files."""
    stock.save_pretrained(folder)
    stock.config.mapping = mapping
    return example.mapped(type(stock)).from_pretrained(folder, config=stock.config).eval()


@pytest.mark.parametrize("mapping", [{"name": "softmax"}, {"name": "multimax", "init": "identity"}])
def test_softmax_gives_the_logits_of_sdpa(stock, mapping, tmp_path):
    model = with_mapping(stock, tmp_path, **mapping)
    stock.set_attn_implementation("sdpa")
    for mask in (None, PRESENT):
        expected, found = (one(TOKENS, attention_mask=mask).logits for one in (stock, model))
        # fp32, sums in another order
        torch.testing.assert_close(found[PRESENT.bool()], expected[PRESENT.bool()], atol=1e-5, rtol=1e-5)


def test_what_a_stock_model_lacks_starts_as_in_a_new_one(stock, tmp_path):
    model = with_mapping(stock, tmp_path, name="multimax", init="shaped", terms=["below"])
    new = example.build_mapping("multimax", init="shaped", terms=["below"])
    modules = [module for module in model.modules() if type(module) is type(new)]
    assert len(modules) == 2
    for module in modules:
        torch.testing.assert_close(dict(module.state_dict()), dict(new.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(module(torch.eye(4)), new(torch.eye(4)), rtol=0, atol=0)


@pytest.mark.parametrize("mapping", [{"name": "multimax"}, {"name": "entmax", "alpha": "learned"}])
def test_it_trains_hides_padding_and_is_saved(stock, mapping, tmp_path):
    stock.config.mapping = mapping
    model = example.mapped(type(stock))(stock.config)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "mapping" in name}
    assert len(start) == 2 * len(list(example.build_mapping(**mapping).parameters()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    labels = TOKENS.masked_fill(PRESENT == 0, -100)
    losses = []
    for _ in range(20):
        losses.append(model(TOKENS, attention_mask=PRESENT, labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    for name, parameter in model.named_parameters():
        assert name not in start or not torch.equal(parameter, start[name]), name

    model.eval()
    logits = model(TOKENS, attention_mask=PRESENT).logits
    others = TOKENS.where(PRESENT.bool(), 49 - TOKENS % 7)
    found = model(others, attention_mask=PRESENT).logits
    assert torch.equal(found[PRESENT.bool()], logits[PRESENT.bool()])
    model.save_pretrained(tmp_path)
    loaded = example.mapped(type(stock)).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(TOKENS, attention_mask=PRESENT).logits, logits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_generates_with_its_cache_what_it_generates_without(name):
    model_class, config = MODELS[name]
    config = copy.deepcopy(config)
    config.mapping = {"name": "multimax", "init": "shaped"}
    model = example.mapped(model_class)(config).eval()
    options = {"attention_mask": PRESENT, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(TOKENS, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, whole) and len(set(cached[0, 20:].tolist())) > 1


def test_scores_that_a_model_changes_in_its_own_way_are_refused(stock):
    with pytest.raises(NotImplementedError, match="softcap"):
        example.attend(stock, *3 * [torch.randn(1, 2, 3, 4)], None, softcap=30.0)
