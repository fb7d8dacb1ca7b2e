"""Checkpoints on disk: there, through Transformers, and back."""

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoConfig, AutoModelForCausalLM

from hf_dilated import BlockSparseConfig, ConfigError, DilatedConfig, PatchError, patch_checkpoint, unpatch_checkpoint
from hf_dilated.integration.persistence import stored_config
from hf_dilated.patching import plan_patch, source
from tests.patching.folders import contents, tensors
from tests.tiny_models import GROUPED, model_class, tiny_config

BLOCKS = BlockSparseConfig(block_size=16, local_blocks=4, global_blocks=1)
PATTERN = DilatedConfig(segment_lengths=(8, 16), dilation_rates=(1, 2), sink_tokens=2)


@pytest.mark.parametrize("link", [True, False])
def test_what_goes_along(checkpoint: Path, tmp_path: Path, link: bool) -> None:
    before = contents(checkpoint)
    plan = patch_checkpoint(checkpoint, tmp_path / "long", attention=PATTERN, link=link)
    assert contents(checkpoint) == before
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    after = contents(tmp_path / "long")
    companions = {"model.safetensors.index.json", "generation_config.json", "tokenizer_config.json"}
    templates = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert set(after) == shards | companions | templates | {"config.json"}
    assert all(after[name] == before[name] for name in after if name != "config.json")
    assert all(os.path.samefile(checkpoint / name, tmp_path / "long" / name) == link for name in shards)
    assert plan.is_linked == link
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "long"}


def test_it_selects_its_backend_and_computes_the_pattern(
    checkpoint: Path, tmp_path: Path, model: tf.PreTrainedModel
) -> None:
    patch_checkpoint(checkpoint, tmp_path / "long", attention=PATTERN)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    assert loaded.config._attn_implementation == "dilated"
    assert stored_config(loaded.config).dilated == PATTERN
    assert loaded.generation_config.max_new_tokens == 7
    ids = torch.arange(1, 41)[None]
    model.config.hf_dilated = PATTERN
    model.set_attn_implementation("dilated")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("scaling", [None, "linear", "dynamic"])
def test_there_and_back_is_the_same_to_the_byte(checkpoint: Path, tmp_path: Path, scaling: str | None) -> None:
    patch_checkpoint(checkpoint, tmp_path / "long", max_position_embeddings=1024, rope_scaling=scaling)
    changed = json.loads((tmp_path / "long" / "config.json").read_text())
    assert changed["rope_parameters"]["rope_type"] == (scaling or "yarn")
    assert changed["hf_dilated"]["dilated"]["segment_lengths"][-1] == 1024
    assert json.loads((tmp_path / "long" / "tokenizer_config.json").read_text()) == {"model_max_length": 1024}
    unpatch_checkpoint(tmp_path / "long", tmp_path / "back")
    back = contents(tmp_path / "back")
    assert {name: contents(checkpoint)[name] for name in back} == back


def test_a_trained_checkpoint_comes_back_too(checkpoint: Path, tmp_path: Path) -> None:
    """Transformers has rewritten the configuration, and the new weights are not the old ones."""
    patch_checkpoint(checkpoint, tmp_path / "long", attention=PATTERN, max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
    before = contents(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "long")  # over hard links
    assert contents(checkpoint) == before
    for keep_rope in (False, True):
        folder = tmp_path / f"back-{keep_rope}"
        unpatch_checkpoint(tmp_path / "long", folder, keep_rope=keep_rope)
        config = AutoConfig.from_pretrained(folder)
        assert (config.hf_dilated, config._attn_implementation) == (None, None)
        assert config.max_position_embeddings == (1024 if keep_rope else 256)
        assert config.rope_parameters["rope_type"] == ("yarn" if keep_rope else "default")
        assert torch.equal(tensors(folder)["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize(
    "options", [{"backend": "block_sparse"}, {"attention": BLOCKS}, {"attention": BLOCKS.to_dict()}]
)
def test_another_backend(checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    patch_checkpoint(checkpoint, tmp_path / "long", max_position_embeddings=4096, **options)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "long").config
    assert config._attn_implementation == "block_sparse"
    assert stored_config(config).dilated is None
    assert stored_config(config).block_sparse == (
        BLOCKS if "attention" in options else BlockSparseConfig.from_model_config(config)
    )


def test_an_old_config_file(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "unknown": {"kept": 1}}
    path.write_text(json.dumps(values, indent=4))
    patch_checkpoint(checkpoint, tmp_path / "long", max_position_embeddings=1024)
    config = AutoConfig.from_pretrained(tmp_path / "long")
    assert config.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}
    assert config.unknown == {"kept": 1}
    unpatch_checkpoint(tmp_path / "long", tmp_path / "back")
    back, plain = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "back", checkpoint))
    assert back.to_dict() | {"_name_or_path": ""} == plain.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("family", ["llava", "gemma3", "gpt2", "qwen3_next", "mixtral"])
def test_families(tmp_path: Path, family: str) -> None:
    plain = model_class(family).from_config(tiny_config(family))
    plain.save_pretrained(tmp_path / "plain")
    positions = plain.config.get_text_config().max_position_embeddings
    length = None if family == "gpt2" else 4 * positions
    patch_checkpoint(tmp_path / "plain", tmp_path / "long", attention=PATTERN, max_position_embeddings=length)
    loaded = model_class(family).from_pretrained(tmp_path / "long")
    assert stored_config(loaded.config).dilated == PATTERN
    text = loaded.config.get_text_config()
    assert text._attn_implementation == "dilated"
    assert text.max_position_embeddings == (length or positions)
    unpatch_checkpoint(tmp_path / "long", tmp_path / "back")
    names = ("config.json", "model.safetensors")
    assert all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "back" / n).read_bytes() for n in names)


def test_a_head_size_that_is_left_open(tmp_path: Path) -> None:
    plain = tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=2))
    plain.save_pretrained(tmp_path / "plain")
    patch_checkpoint(tmp_path / "plain", tmp_path / "long", attention=PATTERN, max_position_embeddings=1024)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long").model.rotary_emb.rope_type == "yarn"
    unpatch_checkpoint(tmp_path / "long", tmp_path / "back")
    assert (tmp_path / "plain" / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()


def test_windows_keep_their_own_rotary_positions(tmp_path: Path) -> None:
    model_class("gemma3").from_config(tiny_config("gemma3")).save_pretrained(tmp_path / "plain")
    patch_checkpoint(tmp_path / "plain", tmp_path / "long", attention=PATTERN, max_position_embeddings=1024)
    rope = AutoConfig.from_pretrained(tmp_path / "long").get_text_config().rope_parameters
    assert rope["full_attention"]["rope_type"] == "yarn"
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_the_cache_of_the_hub_keeps_its_files(checkpoint: Path, tmp_path: Path) -> None:
    """There, files are symbolic links to blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.move(checkpoint, blobs)
    snapshot.mkdir()
    for path in (path for path in blobs.iterdir() if path.is_file()):
        (snapshot / path.name).symlink_to(path)
    patch_checkpoint(snapshot, tmp_path / "long", attention=PATTERN)
    assert not any(path.is_symlink() for path in (tmp_path / "long").iterdir())
    assert tensors(tmp_path / "long").keys() == tensors(blobs).keys()


def test_a_plan_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_patch(checkpoint, tmp_path / "new" / "long", max_position_embeddings=512)
    assert json.dumps(plan.to_dict())
    assert plan.to_dict()["layers"] == {"pattern": 2}
    assert "from_pretrained" in plan.load_statement
    assert set(tmp_path.iterdir()) == {checkpoint}


def broken(checkpoint: Path, how: str) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    match how:
        case "missing shard":
            shard.unlink()
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "corrupt header":
            data = bytearray(shard.read_bytes())
            data[9] = 0
            shard.write_bytes(data)
        case "header length":
            shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
        case "empty":
            shard.write_bytes(b"")
        case "no index":
            (checkpoint / "model.safetensors.index.json").write_text("{}")
        case "index" | "escape":
            index = checkpoint / "model.safetensors.index.json"
            values = json.loads(index.read_text())
            values["weight_map"]["extra.weight"] = shard.name if how == "index" else "../outside.safetensors"
            index.write_text(json.dumps(values))
        case "no config":
            (checkpoint / "config.json").unlink()
        case "config":
            (checkpoint / "config.json").write_text("{")
        case "architecture":
            edit(checkpoint, model_type="llamba")
        case "shape":
            edit(checkpoint, vocab_size=65)
        case "bloom":
            shutil.rmtree(checkpoint)
            tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(
                checkpoint
            )
        case "adapter":
            (checkpoint / "config.json").rename(checkpoint / "adapter_config.json")
        case "bin":
            for path in checkpoint.glob("*.safetensors*"):
                path.unlink()


def edit(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "of the index is missing; finish the download"),
        ("truncated", "is corrupt or truncated"),
        ("corrupt header", "is corrupt or truncated"),
        ("header length", "is corrupt or truncated"),
        ("empty", "is corrupt or truncated"),
        ("no index", "is no index of weights"),
        ("index", "lacks extra.weight, which the index says it holds"),
        ("escape", "outside.safetensors of the index is missing"),
        ("no config", "has no config.json"),
        ("config", "config.json"),
        ("architecture", "llamba"),
        ("shape", "embed_tokens.weight: has the shape (64, 32), but the configuration of LlamaConfig says (65, 32)"),
        ("bloom", "never asks for an attention function|computes its attention itself"),
        ("adapter", "holds an adapter, not a model"),
        ("bin", "it has pytorch_model.bin; load it with Transformers and save it again as safetensors"),
    ],
)
def test_broken_checkpoints_are_refused(checkpoint: Path, tmp_path: Path, how: str, message: str) -> None:
    broken(checkpoint, how)
    before = contents(checkpoint)
    with pytest.raises(PatchError, match=message.replace("(", r"\(").replace(")", r"\)")):
        patch_checkpoint(checkpoint, tmp_path / "long")
    assert contents(checkpoint) == before
    assert set(tmp_path.iterdir()) == {checkpoint}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": {"segment_lengths": [8]}}, ConfigError, "missing dilation_rates"),
        ({"backend": "ring_of_fire"}, ConfigError, "no backend 'ring_of_fire'"),
        (
            {"backend": "block_sparse", "attention": PATTERN},
            PatchError,
            "holds no pattern of the backend 'block_sparse'",
        ),
        ({"max_position_embeddings": 128}, PatchError, "already reads 256 tokens, more than 128"),
        ({"max_position_embeddings": 512, "rope_scaling": "ntk"}, PatchError, "expected one of 'yarn'"),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "ntk"}}, PatchError, "unknown to Transformers"),
        ({"max_position_embeddings": 512, "rope_scaling": {"factor": 2}}, PatchError, "rope_type=None"),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "llama3"}}, PatchError, "low_freq_factor"),
    ],
)
def test_options_are_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        patch_checkpoint(checkpoint, tmp_path / "long", **options)
    assert set(tmp_path.iterdir()) == {checkpoint}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_tokenizer_file(checkpoint: Path, tmp_path: Path, text: str) -> None:
    (checkpoint / "tokenizer_config.json").write_text(text)
    with pytest.raises(PatchError, match=r"tokenizer_config\.json: is no JSON object"):
        patch_checkpoint(checkpoint, tmp_path / "long", max_position_embeddings=1024)
    assert set(tmp_path.iterdir()) == {checkpoint}


def test_a_tokenizer_file_that_broke_since(checkpoint: Path, tmp_path: Path) -> None:
    patch_checkpoint(checkpoint, tmp_path / "long", max_position_embeddings=1024)
    (tmp_path / "long" / "tokenizer_config.json").write_text("{")
    with pytest.raises(PatchError, match=r"tokenizer_config\.json: is no JSON object"):
        unpatch_checkpoint(tmp_path / "long", tmp_path / "back")


def test_learned_positions_cannot_grow(tmp_path: Path) -> None:
    model_class("gpt2").from_config(tiny_config("gpt2")).save_pretrained(tmp_path / "plain")
    with pytest.raises(PatchError, match="no rotary positions that could be scaled, so it cannot read beyond 256"):
        patch_checkpoint(tmp_path / "plain", tmp_path / "long", max_position_embeddings=512)


def test_nothing_is_patched_or_unpatched_twice(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="there is nothing to take out"):
        unpatch_checkpoint(checkpoint, tmp_path / "back")
    patch_checkpoint(checkpoint, tmp_path / "long", attention=PATTERN)
    with pytest.raises(PatchError, match="is patched already"):
        patch_checkpoint(tmp_path / "long", tmp_path / "longer")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link", "source"])
def test_an_existing_destination_is_refused(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    destination = checkpoint if kind == "source" else tmp_path / "long"
    if kind == "folder":
        destination.mkdir()
    elif kind == "file":
        destination.write_text("mine")
    elif kind == "dangling link":
        destination.symlink_to(tmp_path / "nowhere")
    with pytest.raises(PatchError, match="exists already"):
        patch_checkpoint(checkpoint, destination)


def test_a_model_on_the_hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(checkpoint)

    monkeypatch.setattr(source, "snapshot_download", download)
    patch_checkpoint("org/model", tmp_path / "long", revision="v2")
    assert (asked["name"], asked["revision"]) == ("org/model", "v2")
    wanted = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model")
    unwanted = ("pytorch_model.bin", "flax_model.msgpack", "consolidated.pth", "README.md")
    for names, expected in ((wanted, True), (unwanted, False)):
        found = [any(fnmatch.fnmatch(name, p) for p in asked["allow_patterns"]) for name in names]
        assert found == [expected] * 4

    def interrupted(name: str, **options: Any) -> str:
        raise OSError("connection lost")

    monkeypatch.setattr(source, "snapshot_download", interrupted)
    with pytest.raises(PatchError, match="did not complete: connection lost. Repeat the command"):
        patch_checkpoint("org/model", tmp_path / "longer")
    assert set(tmp_path.iterdir()) == {checkpoint, tmp_path / "long"}


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="no such folder"):
        patch_checkpoint("some/where/else", tmp_path / "long")
    with pytest.raises(PatchError, match="no such folder, and the download did not complete"):
        patch_checkpoint("hf-dilated/none", tmp_path / "long", local_files_only=True)
