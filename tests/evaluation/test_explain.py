"""Heat maps lie where their patches are, and ``qformer-fast explain`` draws what the model says."""

import json
import re

import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.transforms.functional import to_tensor

from qformer_fast import Blip2QFormer, ImageEncoder, QFormerConfig, cli
from qformer_fast.assemble import load_encoder
from qformer_fast.data.tokenizer import load_tokenizer, tokenize
from qformer_fast.evaluation import explain

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "encoder_hidden_size": 64,
    "num_query_tokens": 8,
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_encoders(tmp_path_factory):
    """open_clip models of 64 wide tokens: 4 x 4 patches, and 2 x 3."""
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    for name, size in {"tiny-square": 64, "tiny-wide": [32, 48]}.items():
        vision = {"image_size": size, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
        path = tmp_path_factory.mktemp("encoder") / f"{name}.json"
        path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(path)


@pytest.fixture
def model(spread_weights):
    model = Blip2QFormer(QFormerConfig(**SIZES)).eval()
    spread_weights(model)
    return model


def spot(grid, place):
    hot = torch.zeros(grid)
    hot[place] = 1.0
    return hot


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patches_come_last_row_by_row(prefix):
    maps = torch.arange(2 * (prefix + 12)).view(2, -1)
    grid = explain.to_grid(maps, (3, 4), prefix)
    assert grid.shape == (2, 3, 4)
    assert grid[1, 2, 1] == maps[1, prefix + 2 * 4 + 1]
    message = rf"maps must have {prefix + 15} tokens, {prefix} and 3 x 5 patches, got {prefix + 12}"
    with pytest.raises(ValueError, match=message):
        explain.to_grid(maps, (3, 5), prefix)


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (224, 224)), ((2, 3), (32, 48)), ((3, 5), (50, 31))])
def test_a_hot_patch_is_hot_where_it_lies(grid, size):
    for place in [(0, 0), (grid[0] - 1, 0), (1, 2), (grid[0] - 1, grid[1] - 1)]:
        heat = explain.heat_map(spot(grid, place), size)
        assert heat.shape == size and heat.min() == 0 and 0.8 < heat.max() <= 1
        y, x = divmod(int(heat.argmax()), size[1])
        assert (y * grid[0] // size[0], x * grid[1] // size[1]) == place
        rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
        centre = [(at + 0.5) * n / m - 0.5 for at, n, m in zip(place, size, grid, strict=True)]
        far = ((rows - centre[0]).abs() * grid[0] / size[0] > 2) | ((columns - centre[1]).abs() * grid[1] / size[1] > 2)
        assert not bool(heat[far].any())


def test_heat_is_stretched_map_by_map():
    maps = torch.stack([spot((4, 4), (1, 1)), 5 + 1e-3 * spot((4, 4), (2, 3)), torch.full((4, 4), 0.25)])
    heat = explain.heat_map(maps, (40, 40))
    assert heat.shape == (3, 40, 40)
    torch.testing.assert_close(heat.amax((1, 2)), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=0.03)
    assert heat[2].max() == 0
    torch.testing.assert_close(heat[0], explain.heat_map(maps[0], (40, 40)))
    assert explain.heat_map(maps[None], (40, 40)).shape == (1, 3, 40, 40)


def test_colours_go_from_dark_to_bright():
    steps = explain.colour(torch.linspace(0, 1, 101))
    for i, anchor in enumerate(explain.COLOURS):
        torch.testing.assert_close(steps[25 * i] * 255, torch.tensor(anchor).float(), rtol=0, atol=1e-3)
    assert bool((steps @ torch.tensor([0.299, 0.587, 0.114])).diff().gt(0).all())


def test_the_overlay_leaves_cold_places_as_they_are():
    picture = torch.rand(3, 64, 96)
    drawn = explain.overlay(picture, explain.heat_map(spot((4, 6), (1, 4)), (64, 96)))
    assert drawn.size == (96, 64) and drawn.mode == "RGB"
    change = (to_tensor(drawn) - picture).abs().amax(0) * 255
    assert change[:, :40].max() <= 0.51 and change[56:].max() <= 0.51
    bright = torch.tensor(explain.COLOURS[-1]) / 255
    hot = to_tensor(explain.overlay(picture, torch.ones(64, 96)))
    torch.testing.assert_close(hot, 0.2 * picture + 0.8 * bright[:, None, None], rtol=0, atol=0.003)
    centre = slice(None), slice(23, 25), slice(71, 73)
    assert (to_tensor(drawn)[centre] - hot[centre]).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"the size of heat, \(64, 96\), got \(3, 64, 64\)"):
        explain.overlay(picture[..., :64], torch.zeros(64, 96))


@pytest.mark.parametrize(("name", "prefix"), [("tiny-square", 1), ("tiny-wide", 1), ("ViT-B-16-SigLIP", 0)])
def test_tokens_of_an_encoder_lie_where_its_patches_do(name, prefix):
    """The token that changes most with a patch of the picture, as a heat map over the picture."""
    encoder = ImageEncoder(name)
    height, width = encoder.image_size
    rows, columns = encoder.grid
    assert (rows, columns) == (height // 16, width // 16)
    pixels = torch.randn(1, 3, height, width)
    for row, column in [(0, 1), (rows - 1, columns - 1), (1, 0)]:
        changed = pixels.clone()
        changed[..., row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] *= -1
        change = (encoder(changed) - encoder(pixels)).norm(dim=-1)[0]
        heat = explain.heat_map(explain.to_grid(change, encoder.grid, prefix), encoder.image_size)
        y, x = divmod(int(heat.argmax()), width)
        assert (y // 16, x // 16) == (row, column)


@pytest.mark.parametrize("name", ["tiny-square", "tiny-wide"])
def test_the_picture_is_what_the_encoder_sees(name):
    """Of a wide picture with a red, a green and a blue third, the middle, as large as the encoder takes it."""
    encoder = ImageEncoder(name)
    height, width = encoder.image_size
    photo = Image.new("RGB", (360, 120), (0, 255, 0))
    photo.paste((255, 0, 0), (0, 0, 120, 120))
    photo.paste((0, 0, 255), (240, 0, 360, 120))
    picture = encoder.picture(encoder.transform(photo))
    assert picture.shape == (3, height, width)
    scale = height / 120
    left = (360 * scale - width) / 2
    for column in range(width):
        third, off = divmod((column + 0.5 + left) / (120 * scale), 1)
        if 0.05 < off < 0.95:
            expected = torch.eye(3)[int(third)][:, None].expand(-1, height)
            torch.testing.assert_close(picture[..., column], expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("method", ["grad_cam", "attention"])
@pytest.mark.parametrize("name", ["tiny-square", "tiny-wide"])
def test_an_explanation_is_the_models(model, name, method):
    encoder = ImageEncoder(name)
    pixels = encoder.transform(Image.effect_noise((90, 70), 80).convert("RGB"))
    text = tokenize(load_tokenizer(), ["a grey picture"])
    found = explain.explain(model, encoder, pixels, *text, method=method, query="max")
    tokens = encoder(pixels[None])
    assert found.match_probability == pytest.approx(float(model.match(tokens, *text).softmax(-1)[0, 1].detach()))
    cosines = model.image_features(tokens)[0] @ model.text_features(*text)[0]
    assert found.cosine == pytest.approx(float(cosines.max().detach()), abs=1e-6)
    maps = (model.grad_cam if method == "grad_cam" else model.cross_attention_maps)(tokens, *text)
    assert list(found.maps) == [0, 2] and found.layer == 2
    for layer, x in found.maps.items():
        torch.testing.assert_close(x, maps[layer][0])
    drawn = maps[2][0] if method == "grad_cam" else maps[2][0].mean(0)
    grid = drawn.amax(0)[1:].view(encoder.grid)
    torch.testing.assert_close(found.heat, explain.heat_map(grid, encoder.image_size))
    expected = explain.overlay(encoder.picture(pixels), found.heat)
    assert found.overlay.tobytes() == expected.tobytes()
    one = explain.explain(model, encoder, pixels, *text, method=method, layer=0, query=3)
    assert list(one.maps) == [0] and one.layer == 0
    drawn = maps[0][0] if method == "grad_cam" else maps[0][0].mean(0)
    torch.testing.assert_close(one.heat, explain.heat_map(drawn[3, 1:].view(encoder.grid), encoder.image_size))


def test_what_an_explanation_refuses(model):
    encoder = ImageEncoder("tiny-square")
    inputs = encoder, torch.zeros(3, 64, 64), torch.tensor([[101, 2000, 102]])
    with pytest.raises(ValueError, match="method must be one of"):
        explain.explain(model, *inputs, method="saliency")
    with pytest.raises(ValueError, match=r'query must be "mean", "max" or lie in \[0, 8\), got 8'):
        explain.explain(model, *inputs, query=8)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        explain.explain(model.train(), *inputs)


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """Runs ``explain`` on a noisy picture with the model's checkpoint; returns its status."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "model")
    torch.save({"model": model.to_lavis_state_dict()}, tmp_path / "lavis.pth")
    torch.save(open_clip.create_model("tiny-wide").state_dict(), tmp_path / "tiny-wide.pt")
    Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / "noise.png")

    def run(image="noise.png", caption="A grey picture!", **changes):
        options = {"checkpoint": "model", "encoder": "tiny-wide", "encoder_pretrained": "tiny-wide.pt", "device": "cpu"}
        arguments = [part for name, value in (options | changes).items() for part in (f"--{name}", str(value))]
        return cli.main(["explain", image, caption, *arguments])

    return run


def test_the_command_draws_and_prints(run, tmp_path, model, capsys):
    assert run(tensors="out/maps.safetensors") == 0
    printed = re.search(r"match ([\d.]+) \(ITM\), cosine (-?[\d.]+) \(ITC\)", capsys.readouterr().out)
    match, cosine = map(float, printed.groups())
    encoder = load_encoder("tiny-wide", "tiny-wide.pt", random=False)
    pixels = cli.read_pixels("noise.png", encoder.transform)
    expected = explain.explain(model, encoder, pixels, *tokenize(load_tokenizer(), ["a grey picture"]))
    assert (match, cosine) == pytest.approx((expected.match_probability, expected.cosine), abs=1e-4)
    with Image.open("explain.png") as drawn:
        assert drawn.format == "PNG" and drawn.size == (48, 32)
        assert drawn.tobytes() == expected.overlay.tobytes()
    tensors = safetensors.torch.load_file("out/maps.safetensors")
    assert set(tensors) == {"layer.0", "layer.2", "heat"}
    torch.testing.assert_close(tensors["layer.2"], expected.maps[2])
    torch.testing.assert_close(tensors["heat"], expected.heat)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["maps.safetensors"]


def test_the_commands_options_are_the_functions(run, capsys):
    options = {"method": "attention", "layer": 0, "query": 5, "output": "a.png", "tensors": "a.safetensors"}
    assert run(**options) == 0
    assert "attention, layer 0, query 5: a.png" in capsys.readouterr().out
    with safe_open("a.safetensors", "pt") as file:
        assert set(file.keys()) == {"layer.0", "heat"} and file.get_slice("layer.0").get_shape() == [4, 8, 7]


def test_a_lavis_file_is_explained_like_its_folder(run):
    sizes = {f"qformer.{name}": value for name, value in SIZES.items()}
    assert run(tensors="folder.safetensors") == 0
    assert run(checkpoint="lavis.pth", tensors="lavis.safetensors", **sizes) == 0
    folder, lavis = (safetensors.torch.load_file(f"{name}.safetensors") for name in ("folder", "lavis"))
    torch.testing.assert_close(lavis, folder)


@pytest.mark.parametrize("caption", ["null", "3", "a: b", "[x]", "{y}"])
def test_captions_are_taken_as_they_are(run, caption):
    assert run(caption=caption) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "nowhere.png"}, "nowhere.png is no readable picture"),
        ({"image": "lavis.pth"}, "lavis.pth is no readable picture"),
        ({"image": "model"}, "model is no readable picture"),
        ({"caption": ""}, "caption must have a word in it, got ''"),
        ({"caption": " .! "}, "caption must have a word in it, got ' .! '"),
        ({"layer": 1}, "layers must be among those with cross-attention, [0, 2], got [1]"),
        ({"query": 8}, 'query must be "mean", "max" or lie in [0, 8), got 8'),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
        ({"encoder": "ViT-Z"}, "name must be one of open_clip's models"),
        ({"encoder": "ViT-B-32", "encoder_pretrained": "null"}, "encoder_pretrained must name weights of ViT-B-32"),
        (
            {"encoder": "ViT-B-32", "encoder_pretrained": "null", "random_encoder": "true"},
            "image_embeds must be (images, tokens, 64), got (1, 50, 768)",
        ),
    ],
)
def test_what_the_command_refuses_is_named(run, tmp_path, capsys, changes, message):
    before = sorted(tmp_path.iterdir())
    assert run(**changes) == 1
    error = capsys.readouterr().err
    assert "qformer-fast explain: " in error and message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "value"), [("method", "saliency"), ("query", "least"), ("layer", "last")])
def test_words_that_the_command_does_not_know(run, capsys, name, value):
    with pytest.raises(SystemExit):
        run(**{name: value})
    assert name in capsys.readouterr().err
