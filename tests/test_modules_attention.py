"""MappedMultiheadAttention against fairseq's own with softmax, and against the oracles with the others."""

import copy

import pytest
import reference
import torch
from fairseq.modules import MultiheadAttention

from multimax_fairseq.mappings import MAPPINGS, build_mapping
from multimax_fairseq.modules import MappedMultiheadAttention
from multimax_fairseq.modules.scale import SCALES

EMBED_DIM, NUM_HEADS, SRC_LEN, BSZ = 8, 2, 5, 3
HIDDEN = torch.triu(torch.ones(SRC_LEN, SRC_LEN, dtype=torch.bool), 1)
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)


def make(mapping="softmax", scale="none", site="encoder", **options):
    """The same attention twice: fairseq's, and one with a mapping, and a scale that has learned something."""
    stock = MultiheadAttention(EMBED_DIM, NUM_HEADS, **(options or {"self_attention": True}))
    module = build_mapping(mapping) if isinstance(mapping, str) else mapping
    mapped = copy.deepcopy(stock)
    mapped = MappedMultiheadAttention.adopt(mapped, module, site, SCALES[scale](NUM_HEADS))
    with torch.no_grad():
        for parameter in mapped.scale.parameters() if mapped.scale else ():
            parameter.copy_(torch.linspace(0.6, 1.4, parameter.numel()))
    return stock.eval(), mapped.eval()


def inputs(length=SRC_LEN, bsz=BSZ, seed=1):
    return torch.randn(length, bsz, EMBED_DIM, generator=torch.Generator().manual_seed(seed))


def additive(value):
    return torch.zeros(SRC_LEN, SRC_LEN).masked_fill(HIDDEN, value)


MASKS = [  # and the site of who gets them
    ("encoder", None),
    ("decoder", additive(float("-inf"))),
    ("encoder", additive(float("-inf"))),
    ("encoder", -100 * torch.arange(SRC_LEN).float().expand(SRC_LEN, SRC_LEN)),
]


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("site, mask", MASKS, ids=["none", "causal", "added", "bias"])
def test_softmax_is_fairseqs_attention(site, mask, padding, options):
    stock, mapped = make(site=site, self_attention=True, **options)
    x, arguments = inputs(), {"key_padding_mask": padding, "attn_mask": mask}
    expected = stock(x, x, x, **arguments)
    torch.testing.assert_close(mapped(x, x, x, **arguments), expected)
    torch.testing.assert_close(mapped(x, x, x, need_weights=False, **arguments)[0], expected[0])
    if not options:
        stock._set_skip_embed_dim_check()  # the torch kernel that it leaves through has no weights per head
        arguments["need_head_weights"] = True
        torch.testing.assert_close(mapped(x, x, x, **arguments), stock(x, x, x, **arguments))


def test_a_mask_for_each_head():
    stock, mapped = make()
    x, mask = inputs(), torch.rand(BSZ * NUM_HEADS, SRC_LEN, SRC_LEN) > 0.5
    mask[:, :, 0] = False
    expected = stock(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(mapped(x, x, x, attn_mask=mask, need_weights=False)[0], expected)


@pytest.mark.parametrize("name", MAPPINGS)
def test_weights_are_what_the_mapping_makes_of_the_scores(name):
    (_, mapped), x = make(name), inputs()
    arguments = {"key_padding_mask": PADDING, "attn_mask": additive(float("-inf"))}
    scores, _ = mapped(x, x, x, before_softmax=True, **arguments)
    _, weights = mapped(x, x, x, need_head_weights=True, **arguments)
    expected = mapped.mapping(scores.view(BSZ, NUM_HEADS, SRC_LEN, SRC_LEN))
    torch.testing.assert_close(weights.transpose(0, 1), expected, atol=0, rtol=0)
    assert weights.masked_select(HIDDEN).eq(0).all()


@pytest.mark.parametrize("mask", [HIDDEN, HIDDEN.to(torch.uint8), additive(-1e4)], ids=["bool", "uint8", "-1e4"])
def test_finite_and_boolean_masks_hide_as_minus_infinity_does(mask):
    _, mapped = make("multimax")
    x = inputs()
    expected = mapped(x, x, x, attn_mask=additive(float("-inf")), need_head_weights=True)
    actual = mapped(x, x, x, attn_mask=mask, need_head_weights=True)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("beam", [1, pytest.param(4, marks=pytest.mark.skipif(
    not hasattr(MultiheadAttention, "set_beam_size"), reason="this fairseq does not share beams"
))])  # fmt: skip
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MAPPINGS)
def test_static_keys_are_projected_once_and_shared_by_the_hypotheses_of_a_beam(name, scale, beam):
    _, mapped = make(name, scale, encoder_decoder_attention=True)
    query = inputs(length=2, bsz=BSZ * beam)
    encoder_out = inputs(seed=2).repeat_interleave(beam, dim=1)
    padding = PADDING.repeat_interleave(beam, dim=0)
    common = dict(key_padding_mask=padding, static_kv=True, need_head_weights=True)
    expected = mapped(query, encoder_out, encoder_out, **common)
    if beam > 1:
        mapped.set_beam_size(beam)
    incremental_state, steps = {}, []
    for step in query:
        steps.append(mapped(step[None], encoder_out, encoder_out, incremental_state=incremental_state, **common))
        encoder_out = torch.full_like(encoder_out, float("nan"))  # what is projected again shows
    assert mapped._get_input_buffer(incremental_state)["prev_key"].size(0) == BSZ
    for actual, whole, dim in zip(zip(*steps), expected, (0, 2)):  # output, and weights of heads
        torch.testing.assert_close(torch.cat(actual, dim), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_and_close_to_single(dtype, scale):
    _, mapped = make("multimax", scale)
    x = inputs()
    expected, _ = mapped(x, x, x, attn_mask=additive(float("-inf")))
    mapped, x = mapped.to(dtype), x.to(dtype)
    output, weights = mapped(x, x, x, attn_mask=additive(-1e4).to(dtype))
    assert output.dtype == dtype and weights.dtype == torch.float32
    # four to eight roundings to 8 bits (bf16) of numbers around 1
    torch.testing.assert_close(output.float(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0.02)
    output.float().pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mapped.parameters() if parameter.grad is not None)


def test_learned_alpha_of_each_head_reaches_its_own_head():
    _, mapped = make(build_mapping("entmax", alpha="learned", num_heads=NUM_HEADS))
    with torch.no_grad():
        mapped.mapping.alpha_logits.copy_(torch.tensor([-20.0, 20.0]))  # nearly softmax, and sparsemax
    x = 3 * inputs()
    scores, _ = mapped(x, x, x, before_softmax=True)
    _, weights = mapped(x, x, x, need_head_weights=True)
    scores = scores.view(BSZ, NUM_HEADS, SRC_LEN, SRC_LEN)
    expected = reference.over_rows(reference.sparsemax, scores[:, 1])
    torch.testing.assert_close(weights[1].double(), expected, atol=1e-5, rtol=0)
    assert weights[0].gt(0).sum() > weights[1].gt(0).sum()


def test_an_attention_that_is_not_fairseqs_own_is_refused():
    class Slower(MultiheadAttention):
        pass

    attentions = [Slower(EMBED_DIM, NUM_HEADS), MultiheadAttention(EMBED_DIM, NUM_HEADS)]
    attentions[-1].use_xformers = True  # as --decoder-xformers-att-config sets it where xFormers is installed
    for attention in attentions:
        words = f"{type(attention).__name__} attends in its own way.*leave cross out of --attention-mapping-sites"
        with pytest.raises(TypeError, match=words):
            MappedMultiheadAttention.adopt(attention, build_mapping("softmax"), "cross")


@pytest.mark.parametrize("length, bsz", [(0, 2), (5, 0)])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("name", MAPPINGS)
def test_no_queries_or_no_sentences(name, length, bsz, need_weights):
    _, mapped = make(name, encoder_decoder_attention=True)
    query, memory = torch.randn(length, bsz, EMBED_DIM), torch.randn(7, bsz, EMBED_DIM)
    assert mapped(query, memory, memory, need_weights=need_weights)[0].shape == query.shape


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["multimax", "entmax15"])
def test_it_can_be_traced_and_compiled_into_one_graph(name, scale):
    _, mapped = make(name, scale)
    x = inputs()
    expected, _ = mapped(x, x, x)
    traced = torch.jit.trace(mapped, (x.flip(0), x.flip(0), x.flip(0)))
    torch.testing.assert_close(traced(x, x, x)[0], expected)
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("site, mask", MASKS[:3], ids=["none", "causal", "added"])
@pytest.mark.parametrize("name, scale", [*((name, "none") for name in MAPPINGS),
                                         *(("multimax", scale) for scale in SCALES if scale != "none")])  # fmt: skip
def test_with_and_without_weights_is_the_same_dropout_included(name, scale, site, mask):
    _, mapped = make(name, scale, site, self_attention=True, dropout=0.3)
    mapped.train()
    x, results, padding = inputs().requires_grad_(), [], PADDING.clone()
    padding[2] = True  # a sentence without keys
    for need_weights in (True, False):
        torch.manual_seed(0)
        output, weights = mapped(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights)
        assert not need_weights or (weights[:2].sum(-1) - 1).abs().max() < 1e-5  # those before dropout
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *mapped.parameters()])])
    assert scale == "none" or results[0][-1].abs().sum() > 0
    torch.testing.assert_close(output[:, 2], mapped.out_proj.bias.expand(SRC_LEN, -1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
