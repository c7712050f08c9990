"""MoRA against a loop, its controls, what trains, and the encoder's promises about presence."""

import itertools

import pytest
import torch

from minilora.mora import METHODS, FoldedMoRA, MoRA, MoRABlock, adapter_parameters, attach, fold, gates
from minilora.vit import ViT

NAMES = ("image", "note", "vitals", "labs")
COLUMNS = {"vitals": [5, 6, 7], "labs": [8, 9]}


def make(M, absent="mask", seed=0, **sizes):
    torch.manual_seed(seed)
    columns = {k: v for k, v in COLUMNS.items() if k in NAMES[:M]}
    sizes = {"image_size": 16, "patch": 8, "width": 16, "depth": 2, "heads": 2, "buckets": 64, "positions": 5} | sizes
    return ViT(NAMES[:M], 3, columns, absent=absent, **sizes).double().eval()


def batch_of(M, B, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (B, 5), generator=g)
    ids[:, 0], ids[::2, 4] = 1, 0
    values = {"image": torch.randn(B, 1, 16, 16, generator=g).double(), "note": ids,
              "vitals": torch.randn(B, 3, generator=g).double(), "labs": torch.randn(B, 2, generator=g).double()}
    return {m: values[m] for m in NAMES[:M]}


def all_patterns(M):
    return torch.tensor([p for p in itertools.product((1.0, 0.0), repeat=M) if any(p)]).double()


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_vectorised_equals_the_loop_over_samples_with_gradients(M):
    torch.manual_seed(M)
    mora = MoRA(6, NAMES[:M], rank=3).double()
    torch.nn.init.normal_(mora.up)
    present = all_patterns(M)
    x = torch.randn(len(present), 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    def loop():
        rows = []
        for b in range(len(x)):  # h = sum over the present m of (x . down) . up_m
            h = torch.zeros(5, 6, dtype=torch.float64)
            for m in range(M):
                if present[b, m]:
                    h = h + (x[b] @ mora.down) @ mora.up[m]
            rows.append(h)
        return torch.stack(rows)

    fast, slow = mora(x, present), loop()
    assert fast.abs().max() > 1
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    leaves = [x, mora.down, mora.up]
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), leaves), torch.autograd.grad((slow * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for row in present:
        folded = FoldedMoRA(mora, row)
        torch.testing.assert_close(folded(x), mora(x, row.expand(len(x), M)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prompt"])
@pytest.mark.parametrize("absent", ["mask", "dummy"])
def test_a_fresh_adapter_leaves_the_output_bit_identical(method, absent):
    model, batch, present = make(3, absent), batch_of(3, 7), all_patterns(3)
    before = model(batch, present)
    attach(model, method)
    model.double()
    assert torch.equal(model(batch, present, gates(method, present, present.flip(0))), before)


def test_only_adapter_pooler_and_head_get_gradients():
    for method in METHODS:
        model, present = attach(make(2), method).double(), all_patterns(2)
        model(batch_of(2, 3), present, gates(method, present, present)).square().sum().backward()
        got = {n for n, p in model.named_parameters() if p.grad is not None}
        allowed = {n for n, _ in model.named_parameters() if n.startswith(("pooler.", "head."))} | set(adapter_parameters(model))
        assert {n for n, p in model.named_parameters() if p.requires_grad} >= got
        if method == "full":
            assert got == {n for n, _ in model.named_parameters()}
        else:
            assert got == allowed, method


@pytest.mark.parametrize("absent", ["mask", "dummy"])
@pytest.mark.parametrize("M", [2, 3, 4])
def test_content_of_an_absent_modality_changes_nothing_bit_for_bit(M, absent):
    model, present = attach(make(M, absent), "mora").double(), all_patterns(M)
    torch.nn.init.normal_(model.blocks[0].mora.up)
    one, other = batch_of(M, len(present), 1), batch_of(M, len(present), 2)
    here = {m: present[:, i] > 0 for i, m in enumerate(NAMES[:M])}
    mixed = {m: torch.where(here[m].reshape(-1, *[1] * (one[m].dim() - 1)), one[m], other[m]) for m in one}
    assert torch.equal(model(one, present), model(mixed, present))
    assert not torch.equal(model(one, torch.ones_like(present)), model(mixed, torch.ones_like(present)))


@pytest.mark.parametrize("absent", ["mask", "dummy"])
def test_a_pattern_without_the_absent_inputs_equals_the_masked_whole(absent):
    model = attach(make(3, absent), "mora").double()
    torch.nn.init.normal_(model.blocks[0].mora.up)
    batch = batch_of(3, 4)
    batch["vitals"][1, 2] = float("nan")
    for row in all_patterns(3):
        kept = {m: v for i, (m, v) in enumerate(batch.items()) if row[i]}
        short = model(kept, gates=row.expand(4, 3))
        torch.testing.assert_close(short, model(batch, row.expand(4, 3)), rtol=1e-12, atol=1e-12)


def test_a_nan_column_equals_a_missing_column_and_never_leaks():
    model, batch, present = make(3), batch_of(3, 2), torch.ones(2, 3).double()
    whole = model(batch, present)
    batch["vitals"][0, 1] = float("nan")
    out = model(batch, present)
    assert out.isfinite().all() and torch.equal(out[1], whole[1]) and not torch.equal(out[0], whole[0])


def test_padding_is_not_attended():
    model, batch = make(2), batch_of(2, 2)
    batch["note"][:, 4] = 0
    torch.testing.assert_close(model(batch), model({**batch, "note": batch["note"][:, :4]}), rtol=1e-12, atol=1e-12)


def test_vilt_b32_counts():
    """9,216 MoRA parameters and the paper's "less than 1.6%" trainable, counted on the meta device."""
    with torch.device("meta"):
        model = ViT(("image", "note"), 8, image_size=384, channels=3, patch=32, width=768, depth=12, heads=12, buckets=30522,
                    positions=40)
        attach(model, "mora", rank=4)
    adapter = sum(p.numel() for p in adapter_parameters(model).values())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert adapter == 9216
    assert round(100 * trainable / total, 2) == 1.59


@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_the_plain_branch_has_moras_parameters(M):
    count = {m: sum(p.numel() for p in adapter_parameters(attach(make(M), m, rank=4)).values()) for m in ("mora", "lora", "mora-open")}
    assert count["mora"] == count["lora"] == count["mora-open"] > 0


def test_gates_of_the_controls():
    present = all_patterns(2)
    assert gates("mora", present) is present and gates("mora-all", present) is present
    assert torch.equal(gates("mora-open", present), torch.ones(3, 2).double())
    assert torch.equal(gates("lora", present), torch.ones(3, 1).double())
    assert torch.equal(gates("mora-shuffled", present, present.flip(0)), present.flip(0))


def test_folded_model_equals_the_live_one():
    for method in ("lora", "mora", "mora-open", "mora-all"):
        model, batch = attach(make(2), method).double(), batch_of(2, 3)
        for block in model.blocks:
            if isinstance(block, MoRABlock):
                torch.nn.init.normal_(block.mora.up)
        row = torch.tensor([[1.0, 0.0]]).double()
        live = model(batch, row.expand(3, 2), gates(method, row.expand(3, 2)))
        fold(model, gates(method, row)[0])
        torch.testing.assert_close(model(batch, row.expand(3, 2)), live, rtol=1e-12, atol=1e-12)


def test_mora_block_passes_on_what_foreign_blocks_take_and_return():
    class Foreign(torch.nn.Module):
        def forward(self, hidden, mask, scale=1.0):
            return hidden * scale + mask, "attentions"

    mora = MoRA(4, 2)
    torch.nn.init.normal_(mora.up)
    block, x, present = MoRABlock(Foreign(), mora), torch.randn(3, 2, 4), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    block.present = present
    hidden, rest = block(x, 5.0, scale=2.0)
    assert rest == "attentions"
    torch.testing.assert_close(hidden, x * 2 + 5 + mora(x, present))


def test_refusals_of_the_modules():
    for build, words in ((lambda: ViT(image_size=30, patch=8), "30 is not divisible by the patch size 8"),
                         (lambda: ViT(width=30, heads=4), "30 is not divisible by 4 heads"),
                         (lambda: ViT(absent="none"), "'none' is not known"), (lambda: MoRA(4, 2, rank=0), "rank 0"),
                         (lambda: attach(make(2), "dora"), "'dora' is not known"),
                         (lambda: attach(make(2), "mora").double()(batch_of(2, 1)), "which modalities are present")):
        with pytest.raises(ValueError, match=words):
            build()
