"""MoRA against a loop, its controls, what trains, and the encoder's promises about presence."""

import copy
import itertools
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minilora import mora as module
from minilora.models import make_vit
from minilora.mora import METHODS, FoldedMoRA, MoRA, MoRABlock, adapter_parameters, attach, fold, gates
from minilora.vit import ViT

NAMES = ("image", "note", "vitals", "labs")
COLUMNS = {"vitals": [5, 6, 7], "labs": [8, 9]}


def make(M, absent="mask", seed=0, **sizes):
    torch.manual_seed(seed)
    columns = {k: v for k, v in COLUMNS.items() if k in NAMES[:M]}
    sizes = {"image_size": 16, "patch": 8, "width": 16, "depth": 2, "heads": 2, "buckets": 64, "positions": 5} | sizes
    return make_vit(dict(modalities=NAMES[:M], classes=3, columns=columns, absent=absent, **sizes)).double().eval()


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


# ---- where it pays to be told the pattern: a linear, sum-pooled backbone, absent inputs filled with another sample's


def gaussian_moments():
    """(S [3,8,8], k [3,8], v): covariance of the inputs, their covariance with y, and y's variance. Rows of S and k: both
    modalities present, the first alone, the second alone.

    Two modalities of 4 features, feature j of one and of the other of correlation .8, else independent, all of variance 1.
    y is 5/24 of the sum of the eight, with noise of variance 5/24. What is absent is another sample's, independent."""
    whole = torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64).kron(torch.eye(4).double())  # [8,8]
    w = torch.full((8,), 5 / 24).double()
    own = torch.tensor([[1.0, 1], [1, 0], [0, 1]]).double().repeat_interleave(4, 1)  # [3,8], 1: the sample's own
    S = torch.where(own[:, :, None] * own[:, None] > 0, whole, torch.eye(8).double())
    return S, own * (whole @ w), w @ whole @ w + 5 / 24


class Pooled(torch.nn.Module):
    """A frozen map of each modality, a frozen linear block with the branch beside it, the sum over tokens, a linear head."""

    def __init__(self, method, width=8, rank=4):
        super().__init__()
        self.maps = torch.nn.Parameter(torch.randn(2, 4, width) / 2, requires_grad=False)
        block = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
        # The plain branch has as many parameters: 2 r' D = (1 + M) r D.
        branch = MoRA(width, 1, rank * 3 // 2) if method == "lora" else MoRA(width, 2, rank)
        self.block = MoRABlock(block, branch)
        self.head = torch.nn.Linear(width, 1, bias=False)
        self.method = method

    def forward(self, x, present):
        """x [B,8] or [B,2,4], present [B,2] -> [B]."""
        tokens = torch.einsum("bmf,mfd->bmd", x.view(-1, 2, 4), self.maps)  # [B,2,D]
        return self.head(self.block(tokens, present=gates(self.method, present)).sum(1))[:, 0]

    def risk(self, S, k, v):
        """The exact expected squared error, a third of the samples of each pattern: under each, the model is linear in x."""
        patterns = torch.tensor([[1.0, 1], [1, 0], [0, 1]]).double()
        c = torch.stack([self(torch.eye(8).double(), row.expand(8, 2)) for row in patterns])  # [3,8]
        return (v - 2 * (c * k).sum(1) + torch.einsum("pi,pij,pj->p", c, S, c)).mean()


def fit(method, moments):
    """The model of least exact risk."""
    torch.manual_seed(0)
    model = Pooled(method).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(trained, max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-13, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        risk = model.risk(*moments)
        risk.backward()
        return risk

    optimizer.step(closure)
    return model


def test_told_the_pattern_mora_reaches_the_optimum_of_a_pooled_linear_backbone_and_the_plain_branch_cannot():
    S, k, v = moments = gaussian_moments()
    # Told the pattern, the best guess is E[y | what is present]; what is another sample's has k = 0 and drops out.
    best = (v - torch.einsum("pi,pij,pj->p", k, torch.linalg.inv(S), k)).mean()
    # Not told, the best linear guess is that of the mixture of the three patterns.
    blind = v - k.mean(0) @ torch.linalg.inv(S.mean(0)) @ k.mean(0)
    assert best.item() == pytest.approx(1 / 4) and blind.item() == pytest.approx(25 / 57)  # .4386
    models = {method: fit(method, moments) for method in ("mora", "lora", "mora-open")}
    risks = {method: model.risk(*moments).item() for method, model in models.items()}
    assert best - 1e-6 < risks["mora"] < best + 0.01
    for method in ("lora", "mora-open"):
        assert risks[method] > best + 0.05
        assert blind - 1e-6 < risks[method] < blind + 0.01  # trained as far as a branch can get that is not told
    counts = {sum(p.numel() for p in model.block.mora.parameters()) for model in models.values()}
    assert len(counts) == 1

    # The moments are those of samples whose absent modality is another sample's.
    g = torch.Generator().manual_seed(0)
    n = 60_000
    shared, own, noise = (torch.randn(shape, generator=g).double() for shape in ((n, 1, 4), (n, 2, 4), (n,)))
    x = 0.8**0.5 * shared + 0.2**0.5 * own  # [n,2,4]
    y = 5 / 24 * x.sum((1, 2)) + (5 / 24) ** 0.5 * noise
    present = torch.tensor([[1.0, 1], [1, 0], [0, 1]]).double().repeat(n // 3, 1)
    filled = torch.where(present[..., None] > 0, x, x.roll(1, 0))
    for method, model in models.items():
        assert (model(filled, present) - y).square().mean().item() == pytest.approx(risks[method], abs=0.01)


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
                         (lambda: make_vit({"absent": "none"}), "'none' is not known"), (lambda: MoRA(4, 2, rank=0), "rank 0"),
                         (lambda: attach(make(2), "dora"), "'dora' is not known"),
                         (lambda: attach(make(2), "mora").double()(batch_of(2, 1)), "which modalities are present"),
                         (lambda: MoRA(768, ("image")), r"'image': write each name once, as in \('image',\)"),
                         (lambda: MoRA(768, ("image", "note", "image")), "'image', 'note', 'image'.*each name once")):
        with pytest.raises(ValueError, match=words):
            build()


# ---- half precision


class Wide(torch.nn.Module):
    """A block that computes in its own dtype, as a frozen one does."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        return self.layer(x)


def block_of(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    block = MoRABlock(Wide(dtype), MoRA(16, ("image", "note"), 2), **options)
    torch.nn.init.normal_(block.mora.up, std=0.1)
    return block


@pytest.mark.parametrize("dtype,error", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-6)])
def test_a_fresh_branch_beside_a_block_of_another_dtype(dtype, error):
    block = block_of(dtype)
    x, present = torch.randn(3, 5, 16, dtype=dtype), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    assert block.mora.down.dtype == block.mora.up.dtype == torch.float32
    branch = block.mora(x, present)
    exact = copy.deepcopy(block.mora).double()(x.double(), present)
    assert block(x, present=present).dtype == branch.dtype == dtype
    assert (branch.double() - exact).abs().max() < error * exact.abs().max()
    folded = FoldedMoRA(block.mora, present[1])
    assert folded.up.dtype == torch.float32
    torch.testing.assert_close(folded(x)[1], branch[1])
    branch.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in block.mora.parameters())


def test_ten_steps_beside_a_bfloat16_block_move_every_weight():
    block = block_of(torch.bfloat16)
    before = copy.deepcopy(block.mora)
    optimizer = torch.optim.AdamW(block.mora.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(10):
        optimizer.zero_grad()
        block(torch.randn(8, 5, 16, dtype=torch.bfloat16), present=torch.ones(8, 2)).float().square().mean().backward()
        optimizer.step()
    assert all((new != old).all() for new, old in zip(block.mora.parameters(), before.parameters()))


def test_a_branch_that_was_cast_by_hand_works_and_a_default_dtype_does_not_reach_it():
    block, x, present = block_of(), torch.randn(2, 5, 16), torch.ones(2, 2)
    exact = block.mora(x, present)
    cast = copy.deepcopy(block.mora).bfloat16()(x, present)
    assert cast.dtype == torch.float32 and (cast - exact).abs().max() < 2e-2 * exact.abs().max()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {p.dtype for p in MoRA(4, 2).parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_float32_graph_casts_no_weights(tmp_path):
    import onnx

    x, present = torch.randn(3, 5, 16), torch.ones(3, 2)
    for branch, inputs in ((FoldedMoRA(block_of().mora, present[0]), (x,)), (block_of().mora, (x, present))):
        torch.onnx.export(branch, inputs, tmp_path / "branch.onnx", dynamo=False, opset_version=17)
        nodes = onnx.load(tmp_path / "branch.onnx").graph.node
        casts = [n for n in nodes if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT]
        assert len(casts) == len(inputs) - 1  # presence is cast, weights are not


# ---- presence that is set


P = torch.tensor([[1.0, 0.0]] * 4)
Q = torch.tensor([[0.0, 1.0]] * 4)


def test_presence_that_was_set_serves_one_call():
    block, x = block_of(), torch.randn(4, 5, 16)
    block.present = P
    assert block.present is P
    assert torch.equal(block(x), block(x, present=P)) and block.present is None
    with pytest.raises(ValueError, match="which modalities are present.*before each call"):
        block(x)  # also for the x that had one
    block.present = P
    assert torch.equal(block(x, present=Q), block(x, present=Q)) and block.present is None  # the argument goes first
    with pytest.raises(ValueError, match="which modalities are present"):
        block(x)
    block.present = P
    block.present = None
    with pytest.raises(ValueError, match="which modalities are present"):
        block(x)
    twice = torch.nn.Sequential(block, block)
    block.present = P
    with pytest.raises(ValueError, match="which modalities are present"):
        twice(x)


@pytest.mark.parametrize("wrong,words", [(P[:3], r"presence \[3, 2\] for x \[B,T,D\] = \[4, 5, 16\]: has to be \[B,M\] = \[4, 2\]"), (P[:1], r"\[1, 2\]"),
                                         (P[0], r"\[2\]"), (torch.ones(4, 3), r"\[4, 3\]"), (torch.ones(4, 1), r"\[4, 1\]")])
def test_presence_of_another_batch_is_refused(wrong, words):
    block, x = block_of(), torch.randn(4, 5, 16)
    with pytest.raises(ValueError, match=words):
        block(x, present=wrong)
    block.present = wrong
    with pytest.raises(ValueError, match=words):
        block(x)
    with pytest.raises(ValueError, match="which modalities are present"):
        block(x)
    block.present = P
    assert torch.equal(checkpoint(block, x, use_reentrant=False), block(x, present=P))
    with pytest.raises(ValueError, match=r"\[4, 2\] for x"):
        block.mora(torch.randn(4, 7, 7, 16), P)  # windows or pixels beside the batch
    with pytest.raises(ValueError, match=r"\[4, 2\] for x"):
        block.mora(torch.randn(4, 16), P)


def test_copies_replicas_and_other_threads_have_no_presence(tmp_path):
    block, x, answers = block_of(), torch.randn(4, 5, 16), {}
    block.present = P
    torch.save(block, tmp_path / "block.pt")
    replica = block._replicate_for_data_parallel()
    for other in (copy.deepcopy(block), copy.copy(block), replica, torch.load(tmp_path / "block.pt", weights_only=False)):
        with pytest.raises(ValueError, match="which modalities are present"):
            other(x)
    assert torch.equal(replica(x, present=P), block(x, present=P))

    def serve(name, present, barrier):
        block.present = present
        barrier.wait()  # both are set before either calls
        answers[name] = block(x)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=serve, args=("p", P, barrier)), threading.Thread(target=serve, args=("q", Q, barrier))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(answers["p"], block(x, present=P)) and torch.equal(answers["q"], block(x, present=Q))
    block.present = P
    thread = threading.Thread(target=lambda: answers.update(error=pytest.raises(ValueError, block, x)))
    thread.start()
    thread.join()
    assert "in the thread that calls" in str(answers["error"].value)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float64])
def test_presence_of_any_dtype(kind):
    block, x = block_of(), torch.randn(4, 5, 16)
    wanted = block(x, present=P)
    assert torch.equal(block(x, present=P.to(kind)), wanted)
    block.present = P.to(kind)
    assert torch.equal(checkpoint(block, x, use_reentrant=False), wanted)


# ---- activation checkpointing


def gradients(run, block=None, same_storage=False):
    """Those of the branch after two forwards, with presence P and Q, and one backward; run(block, x, present) is the forward."""
    block = block or block_of()
    torch.manual_seed(1)
    xs = torch.randn(2, 4, 4 if block.batch_dim else 5, 16)
    xs = [x if same_storage else x.clone().requires_grad_() for x in xs]
    total = 0
    for x, present in zip(xs, (P, Q)):
        total = total + run(block, x, present).square().mean()
    block.present = P  # of a batch that is still to come
    total.backward()
    assert block.present is P
    return [p.grad for p in block.mora.parameters()]


def passed(block, x, present):
    return block(x, present=present)


def set_first(block, x, present):
    block.present = present
    return block(x)


def larger(block, x, present):
    return set_first(block, x * 1.0, present)


WAYS = {"set": lambda b, x, p, r: (setattr(b, "present", p), checkpoint(b, x, use_reentrant=r))[1],
        "set, and overwritten": lambda b, x, p, r: (setattr(b, "present", q := p.clone()), checkpoint(b, x, use_reentrant=r), q.zero_())[1],
        "set inside": lambda b, x, p, r: checkpoint(set_first, b, x, p, use_reentrant=r),
        "set inside a larger function": lambda b, x, p, r: checkpoint(larger, b, x, p, use_reentrant=r),
        "passed": lambda b, x, p, r: checkpoint(passed, b, x, p, use_reentrant=r),
        "passed through a larger function": lambda b, x, p, r: checkpoint(lambda x, p: b(x.tanh().atanh(), present=p), x, p, use_reentrant=r)}


@pytest.mark.parametrize("options", [{}, {"batch_dim": 1}], ids=["B,T,D", "T,B,D"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_forward_has_the_presence_of_its_first_pass(way, reentrant, options):
    plain = gradients(passed, block_of(**options))
    again = gradients(lambda *given: WAYS[way](*given, reentrant), block_of(**options))
    assert plain[1][0].norm() > 0.1 and plain[1][1].norm() > 0.1
    for a, b in zip(again, plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_views_of_one_tensor_and_two_blocks_keep_their_own_presence():
    plain = gradients(passed, same_storage=True)
    again = gradients(lambda *given: WAYS["set"](*given, False), same_storage=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    blocks, x = (block_of(), block_of()), torch.randn(4, 5, 16)  # nor do two blocks share one
    sum(WAYS["set"](block, x, present, False).square().mean() for block, present in zip(blocks, (P, Q))).backward()
    for block, present, m in zip(blocks, (P, Q), (0, 1)):
        assert block.mora.up.grad[m].norm() > 0.1 and block.mora.up.grad[1 - m].norm() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_that_cannot_know_its_presence_is_refused(reentrant):
    def whole(block, x, present):  # its x is made anew in the backward
        block.present = present
        return checkpoint(lambda x: block(x * 1.0), x, use_reentrant=reentrant)

    same = torch.randn(4, 5, 16, requires_grad=True)
    soft = P.clone().requires_grad_()
    for run in (whole, lambda block, x, present: WAYS["set"](block, same, present, reentrant),
                lambda block, x, present: WAYS["set"](block, x, soft * 1.0, reentrant),
                lambda block, x, present: WAYS["set"](block, x, present, False) + WAYS["set"](block, x, soft + present, reentrant)):
        with pytest.raises(RuntimeError, match="hand present .* down as an argument"):
            gradients(run)


def test_one_x_may_come_again_with_an_equal_presence_and_is_forgotten_with_its_memory():
    block, x = block_of(), torch.randn(4, 5, 16)
    for _ in range(3):
        block.present = P.clone()
        out = checkpoint(block, x, use_reentrant=False)
        with torch.inference_mode():
            block.present = Q
            block(x)
        out.square().mean().backward()
    del out
    before = len(module.PAST)
    del x
    assert len(module.PAST) < before


def test_a_torch_without_the_private_question_refuses_what_was_set(monkeypatch):
    block, x = block_of(), torch.randn(4, 5, 16)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    block.present = P
    with pytest.raises(RuntimeError, match="as an argument"):
        block(x)
    assert block(x, present=P).isfinite().all()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_presence_through_torch_func_and_the_compiler():
    block, x = block_of(), torch.randn(4, 5, 16)
    wanted = block(x, present=P)
    block.present = P
    slope = torch.func.grad(lambda x: block(x).sum())(x)
    torch.testing.assert_close(slope, torch.autograd.grad(block(y := x.clone().requires_grad_(), present=P).sum(), y)[0])
    whole = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.allclose(whole(x, present=P), wanted, atol=1e-6)
    block.present = P
    with pytest.raises(Exception, match="pass present as an argument"):
        whole(x)
    torch.compiler.reset()
    parts = torch.compile(block, backend="eager")
    for a, b in zip(gradients(lambda b, x, p: (setattr(b, "present", p), checkpoint(parts, x, use_reentrant=False))[1], block), gradients(passed)):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        parts(x, present=P[:3])


# ---- sequence-first models


def test_a_sequence_first_block_wants_its_batch_dimension():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)  # [T,B,D]
    with pytest.raises(ValueError, match=r"batch_first=False: pass batch_dim=1, or 0 for x \[B,T,D\]"):
        MoRABlock(layer, MoRA(16, 2))
    assert MoRABlock(layer, MoRA(16, 2), batch_dim=0).batch_dim == MoRABlock(Wide(), MoRA(16, 2)).batch_dim == 0
    block = MoRABlock(layer, block_of().mora, batch_dim=1)
    for B in (4, 3):
        x, present = torch.randn(4, B, 16), torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])[:B]
        wanted = layer(x) + torch.stack([block.mora(x[:, [b]].transpose(0, 1), present[[b]])[0] for b in range(B)], 1)
        torch.testing.assert_close(block(x, present=present), wanted)
        block.present = present
        torch.testing.assert_close(block(x), wanted)
    with pytest.raises(ValueError, match=r"\[4, 2\] for x \[B,T,D\] = \[3, 4, 16\]"):
        block(torch.randn(4, 3, 16), present=P)
    with pytest.raises(ValueError, match="pass MoRABlock batch_dim=1"):
        MoRABlock(layer, block.mora, batch_dim=0)(torch.randn(5, 4, 16), present=P)
    block.mora = FoldedMoRA(block.mora, torch.tensor([1.0, 0.0]))
    x = torch.randn(5, 4, 16)
    torch.testing.assert_close(block(x), layer(x) + block.mora(x))
    assert list(block_of().state_dict())[-2:] == ["mora.down", "mora.up"]
