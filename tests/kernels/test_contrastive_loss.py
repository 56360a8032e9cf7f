"""The Triton kernels of contrastive_loss: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from torch.nn import functional as F

from qformer_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# rows, candidates
SHAPES = [(1, 2), (3, 3), (5, 70), (4, 2500), (33, 257)]
OPS = torch.ops.qformer_fast


def inputs(rows, candidates, dtype=torch.float32):
    """Cosines; a row's own column shows its image, and about a tenth of the others do."""
    cosines = [torch.rand(rows, candidates, device=DEVICE).mul(2).sub(1).to(dtype) for _ in range(2)]
    same_image = torch.rand(rows, candidates, device=DEVICE) < 0.1
    same_image[:, :rows].fill_diagonal_(True)
    return *cosines, torch.tensor(0.07, device=DEVICE, dtype=dtype), same_image


def run(op, sim_i2t, sim_t2i, temp, same_image, **options):
    leaves = [x.detach().requires_grad_() for x in (sim_i2t, sim_t2i, temp)]
    loss, *logits = op(*leaves, same_image, **options)
    assert not any(x.requires_grad for x in logits)
    gradients = torch.autograd.grad(loss * 3, leaves)
    names = "loss", "logits_i2t", "logits_t2i", "di2t", "dt2i", "dtemp"
    return dict(zip(names, (loss.detach(), *logits, *gradients), strict=True))


def kernel(*tensors, label_smoothing=0.1):
    return ops.contrastive_loss(*tensors, label_smoothing=label_smoothing, backend="triton")


def plain(sim_i2t, sim_t2i, temp, same_image, label_smoothing=0.1):
    """As the original writes it for pairs with image ids (blip2_qformer.py:152-178)."""
    targets = same_image.to(sim_i2t.dtype) / same_image.sum(1, keepdim=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / same_image.shape[1]
    logits = sim_i2t / temp, sim_t2i / temp
    loss_i2t, loss_t2i = (-(F.log_softmax(x, dim=1) * targets).sum(1).mean() for x in logits)
    return (loss_i2t + loss_t2i) / 2, *(x.detach() for x in logits)


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_loss_logits_and_gradients(shape, label_smoothing, dtype, assert_close):
    tensors = inputs(*shape, dtype)
    options = dict(label_smoothing=label_smoothing)
    actual, low = run(kernel, *tensors, **options), run(plain, *tensors, **options)
    doubles = [x.double() for x in tensors[:3]]
    assert all(actual[name].dtype == dtype for name in actual)
    assert_close(actual, low, run(plain, *doubles, tensors[3], **options))


def test_without_smoothing_one_column_a_row_is_clips_loss():
    sim_i2t, sim_t2i, temp, _ = inputs(6, 6)
    loss, *_ = kernel(sim_i2t, sim_t2i, temp, torch.eye(6, dtype=torch.bool, device=DEVICE), label_smoothing=0.0)
    own = torch.arange(6, device=DEVICE)
    expected = (F.cross_entropy(sim_i2t / temp, own) + F.cross_entropy(sim_t2i / temp, own)) / 2
    torch.testing.assert_close(loss, expected)


def test_large_logits_overflow_nowhere(assert_close):
    sim_i2t, sim_t2i, _, same_image = inputs(5, 70)
    tensors = sim_i2t, sim_t2i, torch.tensor(1e-4, device=DEVICE), same_image
    high = run(plain, *(x.double() for x in tensors[:3]), same_image)
    assert high["logits_i2t"].abs().max() > 9000
    assert_close(run(kernel, *tensors), run(plain, *tensors), high)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_the_temperature_may_be_of_another_dtype(dtypes, assert_close):
    """As in a model of bf16 parameters, whose features are fp32."""
    sim_i2t, sim_t2i, temp, same_image = inputs(5, 70, dtypes[0])
    tensors = sim_i2t, sim_t2i, temp.to(dtypes[1]), same_image
    actual, low = run(kernel, *tensors), run(plain, *tensors)
    assert [actual[name].dtype for name in ("logits_i2t", "di2t", "dtemp")] == [dtypes[0], dtypes[0], dtypes[1]]
    assert_close(actual, low, run(plain, *(x.double() for x in tensors[:3]), same_image))


def test_nan_is_kept():
    tensors = inputs(3, 40)
    tensors[1][2, 30] = torch.nan
    assert kernel(*tensors)[0].isnan()


def test_noncontiguous():
    sim_i2t, sim_t2i, temp, same_image = inputs(4, 4)
    strided = [x.T.contiguous().T for x in (sim_i2t, sim_t2i, same_image)]
    found = run(kernel, *strided[:2], temp, strided[2])
    assert all(torch.equal(x, found[name]) for name, x in run(kernel, sim_i2t, sim_t2i, temp, same_image).items())


def test_formula_gradcheck():
    sim_i2t, sim_t2i, temp, same_image = inputs(3, 5)
    leaves = [x.double().requires_grad_() for x in (sim_i2t, sim_t2i, temp)]
    assert torch.autograd.gradcheck(lambda *x: OPS.contrastive_loss_fwd(*x, same_image, 0.1)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_opcheck(dtype):
    *tensors, same_image = inputs(3, 5, dtype)
    sums = torch.promote_types(dtype, torch.float32)
    losses, logits, *kept = OPS.contrastive_loss_fwd(*tensors, same_image, 0.1)
    assert losses.dtype == kept[0].dtype == kept[1].dtype == sums and logits.dtype == dtype
    torch.library.opcheck(OPS.contrastive_loss_bwd.default, (torch.rand_like(losses), *kept, *tensors, same_image, 0.1))
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(OPS.contrastive_loss_fwd.default, (*leaves, same_image, 0.1))


def test_compiles_without_a_graph_break():
    tensors = inputs(3, 5)
    actual, expected = run(torch.compile(kernel, fullgraph=True), *tensors), run(kernel, *tensors)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


def test_bad_input_is_named():
    sim_i2t, sim_t2i, temp, same_image = inputs(3, 5)
    with pytest.raises(ValueError, match=r"sim_t2i must be \(3, 5\), got \(3, 4\)"):
        ops.contrastive_loss(sim_i2t, sim_t2i[:, :4], temp, same_image)
    with pytest.raises(ValueError, match=r"temp must be \(\), got \(1,\)"):
        ops.contrastive_loss(sim_i2t, sim_t2i, temp[None], same_image)
    with pytest.raises(ValueError, match=r"sim_i2t must have rows and candidates, got \(0, 5\)"):
        ops.contrastive_loss(sim_i2t[:0], sim_t2i[:0], temp, same_image[:0])
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 1.5"):
        ops.contrastive_loss(sim_i2t, sim_t2i, temp, same_image, label_smoothing=1.5)
    with pytest.raises(TypeError, match="temp must be floating-point, got torch.int64"):
        ops.contrastive_loss(sim_i2t, sim_t2i, temp.long(), same_image)
    with pytest.raises(TypeError, match="same_image must be bool, got torch.float32"):
        ops.contrastive_loss(sim_i2t, sim_t2i, temp, same_image.float())
    with pytest.raises(TypeError, match="sim_t2i must be torch.float32, got torch.float16"):
        ops.contrastive_loss(sim_i2t, sim_t2i.half(), temp, same_image)
