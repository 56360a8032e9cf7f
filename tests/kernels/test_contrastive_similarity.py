"""The Triton kernels of contrastive_similarity: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch

from qformer_fast import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# images, queries, dim, texts
SHAPES = [
    (1, 1, 1, 1),
    (3, 32, 64, 5),
    (5, 7, 33, 70),
    (40, 33, 50, 3),
    (2, 256, 16, 9),
    (2, 3, 300, 4),
    (5, 17, 20, 1030),
]
OPS = torch.ops.qformer_fast


def inputs(images, queries, dim, texts, dtype):
    shapes = (images, queries, dim), (texts, dim), (images, texts)
    return [torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes]


def run(op, image_features, text_features, dout):
    features = [x.detach().requires_grad_() for x in (image_features, text_features)]
    out = op(*features)
    dimage, dtext = torch.autograd.grad(out, features, dout.to(out.dtype))
    return {"out": out.detach(), "dimage": dimage, "dtext": dtext}


def kernel(image_features, text_features):
    return ops.contrastive_similarity(image_features, text_features, backend="triton")


def spread(image_features, text_features):
    """Features whose products are small integers, exact in every dtype: no rounding decides which query is largest."""
    return image_features.mul(2).round().clamp(-2, 2), text_features.sign()


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, assert_close):
    tensors = inputs(*shape, dtype)
    actual, low = run(kernel, *tensors), run(reference.contrastive_similarity, *tensors)
    assert actual["out"].dtype == actual["dimage"].dtype == actual["dtext"].dtype == dtype
    assert_close(actual, low, run(reference.contrastive_similarity, *(x.double() for x in tensors)))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("used", ["both", "i2t", "t2i"])
def test_apart_each_gives_one_side_its_gradient(used, assert_close):
    """Against two products, each of which has one side detached."""
    image_features, text_features, di2t = inputs(5, 7, 33, 70, torch.float32)
    dt2i = torch.randn(70, 5, device=DEVICE)

    def run(op, *tensors):
        *features, di2t, dt2i = (x.detach().requires_grad_() for x in tensors)
        i2t, t2i = op(*features)
        losses = {"i2t": (i2t * di2t.detach()).sum(), "t2i": (t2i * dt2i.detach()).sum()}
        sum(losses.values() if used == "both" else [losses[used]]).backward()
        found = {"i2t": i2t, "t2i": t2i, "dimage": features[0].grad, "dtext": features[1].grad}
        return {name: x.detach() for name, x in found.items() if x is not None}

    def plain(images, texts):
        products = [torch.einsum("iqd,td->itq", *x) for x in ((images, texts.detach()), (images.detach(), texts))]
        return products[0].amax(-1), products[1].amax(-1).T

    tensors = image_features, text_features, di2t, dt2i
    found = run(lambda *x: ops.contrastive_similarity(*x, apart=True, backend="triton"), *tensors)
    assert set(found) == {"i2t", "t2i"} | {"both": {"dimage", "dtext"}, "i2t": {"dimage"}, "t2i": {"dtext"}}[used]
    assert_close(found, run(plain, *tensors), run(plain, *(x.double() for x in tensors)))


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_first_of_equal_queries_gets_the_gradient(shape, dtype, assert_close):
    """Small integers tie often; the maximum of fp64 is then the same, and every gradient is compared."""
    image_features, text_features, dout = inputs(*shape, dtype)
    image_features, text_features = spread(image_features, text_features)
    out, _, argmax = OPS.contrastive_similarity_fwd(image_features, text_features, False)
    products = torch.einsum("iqd,td->itq", image_features.double(), text_features.double())
    first = (products == products.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(argmax.long(), first)
    assert torch.equal(out.double(), products.amax(-1))

    def plain(image_features, text_features):
        products = torch.einsum("iqd,td->itq", image_features, text_features)
        return products.gather(-1, first[..., None])[..., 0]

    doubles = [x.double() for x in (image_features, text_features, dout)]
    tensors = image_features, text_features, dout
    assert_close(run(kernel, *tensors), run(plain, *tensors), run(plain, *doubles))


@pytest.mark.parametrize(("images", "texts"), [(0, 3), (3, 0), (0, 0)])
def test_no_images_or_texts(images, texts):
    found = run(kernel, *inputs(images, 4, 8, texts, torch.float32))
    assert found["out"].shape == (images, texts)
    assert found["dimage"].shape == (images, 4, 8) and found["dtext"].shape == (texts, 8)
    assert all(not x.abs().sum() for x in found.values())


@pytest.mark.parametrize("wanted", ["image", "text"])
def test_a_detached_side_costs_nothing(wanted, monkeypatch):
    """As with local gradients."""
    from qformer_fast import kernels

    image_features, text_features, dout = inputs(3, 4, 8, 5, torch.float32)
    both = run(kernel, image_features, text_features, dout)
    unwanted = {"image": "text", "text": "image"}[wanted]
    monkeypatch.delattr(kernels, f"contrastive_similarity_bwd_{unwanted}")
    features = {"image": image_features, "text": text_features}
    kernel(*(x.requires_grad_(name == wanted) for name, x in features.items())).backward(dout)
    assert torch.equal(features[wanted].grad, both[f"d{wanted}"])


def test_noncontiguous(assert_close):
    image_features, text_features, dout = inputs(4, 5, 20, 6, torch.float32)
    strided = [x.mT.contiguous().mT for x in (image_features, text_features, dout)]
    assert not any(x.is_contiguous() for x in strided)
    expected = run(kernel, image_features, text_features, dout)
    assert all(torch.equal(x, expected[name]) for name, x in run(kernel, *strided).items())


@pytest.mark.parametrize("which", ["image", "text"])
def test_nan_is_kept(which):
    image_features, text_features, _ = inputs(3, 5, 8, 4, torch.float32)
    features = {"image": image_features, "text": text_features}
    features[which][1, ..., 3] = torch.nan
    broken = kernel(image_features, text_features).isnan()
    assert torch.equal(broken, reference.contrastive_similarity(image_features, text_features).isnan())
    *_, argmax = OPS.contrastive_similarity_fwd(image_features, text_features, False)
    assert argmax.min() >= 0 and argmax.max() < 5


def test_autocast_runs_in_its_dtype():
    image_features, text_features, dout = inputs(3, 4, 8, 5, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(kernel, image_features, text_features, dout)
        low = reference.contrastive_similarity(image_features, text_features)
    assert found["out"].dtype == low.dtype == torch.bfloat16
    assert found["dimage"].dtype == found["dtext"].dtype == torch.float32


@DTYPES
def test_same_result_twice(dtype):
    tensors = inputs(9, 33, 70, 65, dtype)
    first, *others = (run(kernel, *tensors) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_formula_gradcheck():
    features = [x.double().requires_grad_() for x in inputs(3, 4, 5, 6, torch.float32)[:2]]
    assert torch.autograd.gradcheck(lambda *x: OPS.contrastive_similarity_fwd(*x, False)[0], features)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_opcheck(dtype, apart):
    image_features, text_features, dout = inputs(3, 4, 8, 5, dtype)
    argmax = torch.randint(4, (3, 5), device=DEVICE).to(torch.int16)
    torch.library.opcheck(OPS.contrastive_similarity_bwd_image.default, (dout, argmax, text_features, 4))
    torch.library.opcheck(OPS.contrastive_similarity_bwd_text.default, (dout, argmax, image_features))
    features = image_features.requires_grad_(), text_features.requires_grad_()
    torch.library.opcheck(OPS.contrastive_similarity_fwd.default, (*features, apart))


def test_compiles_without_a_graph_break():
    tensors = inputs(3, 4, 8, 5, torch.float32)

    def twice(image_features, text_features):
        return 2 * kernel(image_features, text_features)

    actual, expected = run(torch.compile(twice, fullgraph=True), *tensors), run(twice, *tensors)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


def test_bad_input_is_named():
    image_features, text_features, _ = inputs(3, 4, 8, 5, torch.float32)
    with pytest.raises(ValueError, match=r"text_features must be \(texts, 8\), got \(5, 7\)"):
        ops.contrastive_similarity(image_features, text_features[:, :7])
    with pytest.raises(ValueError, match=r"image_features must have queries and columns, got \(3, 0, 8\)"):
        ops.contrastive_similarity(image_features[:, :0], text_features)
    with pytest.raises(TypeError, match=r"text_features must be torch.float32, got torch.float16"):
        ops.contrastive_similarity(image_features, text_features.half())
    with pytest.raises(RuntimeError, match="its kernels take 32768 queries, got 32769"):
        kernel(image_features[:1, :1, :1].expand(1, 32769, 1), text_features[:, :1])


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 runs the formula on any device")
def test_fp64_is_refused_by_the_kernels():
    image_features, text_features, _ = inputs(3, 4, 8, 5, torch.float64)
    with pytest.raises(RuntimeError, match=r"can't run this contrastive_similarity: its kernels take fp32"):
        kernel(image_features, text_features)


@pytest.mark.cuda
@DTYPES
def test_blip2_sizes(dtype, assert_close):
    shape = 128, 32, 256, 128
    image_features, text_features, dout = inputs(*shape, dtype)
    features = [torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (image_features, text_features)]
    actual, low = run(kernel, *features, dout), run(reference.contrastive_similarity, *features, dout)
    high = run(reference.contrastive_similarity, *(x.double() for x in (*features, dout)))
    assert_close(actual, low, high)
