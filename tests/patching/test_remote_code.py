"""Checkpoints that carry their code: they load where hf_dilated is not installed."""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_dilated
from hf_dilated import DilatedConfig, patch_checkpoint, unpatch_checkpoint
from hf_dilated.integration import hf_dilated_code
from hf_dilated.integration.carried import CODE, FILES, package_source
from modeling import LongNetConfig, LongNetForCausalLM
from tests.patching.folders import contents
from tests.tiny_checkpoint import save_tiny_checkpoint

PATTERN = DilatedConfig(segment_lengths=(8, 32), dilation_rates=(1, 2))
IDS = torch.arange(1, 41)[None]
ELSEWHERE = """
    import importlib.util, json, shutil, sys
    from pathlib import Path
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
    sys.path = [path for path in sys.path if not (Path(path) / "hf_dilated").is_dir()]
    import torch, transformers
    assert importlib.util.find_spec("hf_dilated") is None

    folder = Path(sys.argv[1])
    expected = torch.load(folder / "expected.pt")
    ids = torch.arange(1, 41)[None]
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", trust_remote_code=False)
    except ValueError as error:
        assert 'attn_implementation="dilated"` is not supported' in str(error), error
    else:
        raise AssertionError("ran without the package")

    def check(path, auto="AutoModelForCausalLM", **options):
        model = getattr(transformers, auto).from_pretrained(path, trust_remote_code=True, **options)
        assert model.config._attn_implementation == "dilated"
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        if auto == "AutoModelForCausalLM":
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, expected[path.name], rtol=0, atol=0)
        return model

    # A program without the package saves the configuration, or the model that it wanted dense.
    rewritten, dense = folder / "rewritten" / "llama", folder / "dense" / "llama"
    shutil.copytree(folder / "llama", rewritten)
    early = transformers.AutoConfig.from_pretrained(rewritten)
    early.save_pretrained(rewritten)
    asked = {"attn_implementation": "sdpa"}
    transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", **asked).save_pretrained(dense)
    for path in rewritten, dense:
        values = json.loads((path / "config.json").read_text())
        assert {"hf_dilated", "auto_map"} <= set(values) and "attn_implementation" not in values
        ran = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
        assert ran.config._attn_implementation == "sdpa"
    try:
        check(dense)
    except OSError as error:
        assert "modeling_hf_dilated.py" in str(error), error
    else:
        raise AssertionError("found code that nobody wrote")
    assert "hf_dilated" not in sys.modules
    check(rewritten)  # the package comes after the configuration
    assert "hf_dilated" in sys.modules
    check(rewritten, config=early)
    ran = transformers.AutoModelForCausalLM.from_pretrained(rewritten, trust_remote_code=True, config=early, **asked)
    assert ran.config._attn_implementation == "sdpa"
    transformers.AutoModelForCausalLM.from_pretrained(dense, trust_remote_code=False).save_pretrained(dense)
    check(dense)  # with its code again

    for name in "longnet", "llama":
        saved = folder / "saved" / name
        model = check(folder / name)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False)
        import hf_dilated
        few = hf_dilated.DilatedCache(model.config)
        assert model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=few).equal(tokens)
        model.save_pretrained(saved)
        check(saved)
    assert hf_dilated.__file__.startswith(sys.argv[2]), hf_dilated.__file__
    check(folder / "llama", "AutoModelForSequenceClassification")
    pipe = transformers.pipeline("text-generation", str(folder / "llama"), trust_remote_code=True)
    assert pipe.model.config._attn_implementation == "dilated"
    assert pipe("def run(", max_new_tokens=2)
"""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched Llama and a LongNet, with what they compute."""
    folder = tmp_path_factory.mktemp("carried")
    plain = save_tiny_checkpoint(folder / "plain")
    patch_checkpoint(plain, folder / "llama", attention=PATTERN, remote_code=True)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    longnet = LongNetForCausalLM(LongNetConfig(vocab_size=50, max_position_embeddings=256, hf_dilated=PATTERN, **sizes))
    longnet.save_pretrained(folder / "longnet")
    llama = AutoModelForCausalLM.from_pretrained(folder / "llama")
    torch.save({"longnet": logits(longnet), "llama": logits(llama)}, folder / "expected.pt")
    return folder


def test_where_the_package_is_not_installed(folder: Path, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = os.pathsep.join(path for path in paths if not (Path(path) / "hf_dilated").is_dir())
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(ELSEWHERE), str(folder), str(modules)],
        env=os.environ | {"PYTHONPATH": others, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("llama", "longnet"):
        before, after = contents(folder / name), contents(folder / "saved" / name)
        code = {file for file in before if file.endswith(".py")}
        assert {file: after[file] for file in code} == {file: before[file] for file in code}


def test_saving_carries_the_code_along_also_after_an_import(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert type(model).__module__.startswith("transformers.models.")
    model.save_pretrained(tmp_path / "saved")
    for file in FILES:
        assert (tmp_path / "saved" / file).read_bytes() == (folder / "llama" / file).read_bytes()
    AutoModelForCausalLM.from_pretrained(folder / "plain").save_pretrained(tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*.py"))


def test_a_configuration_is_not_uploaded_without_its_code(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "llama")
    with pytest.raises(ValueError, match="call config.push_to_hub"):
        config.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_taken_back(folder: Path, tmp_path: Path) -> None:
    unpatch_checkpoint(folder / "llama", tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.py"))
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "back"), "auto_map")


def run(path: Path) -> ModuleType:
    """Import a file as Transformers does."""
    spec = importlib.util.spec_from_file_location("carried_code", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_the_package_word_for_word(tmp_path: Path) -> None:
    (tmp_path / CODE).write_text(package_source())
    module = run(tmp_path / CODE)
    assert module.hf_dilated is hf_dilated
    _, stamp, *parts = package_source().rstrip("\n").split(hf_dilated_code.MARK)
    assert stamp.startswith(f"{hf_dilated.__version__} ")
    files = dict(map(hf_dilated_code._decoded, parts))
    root = Path(hf_dilated.__file__).parents[1]
    assert files == {name: (root / name).read_text("utf-8") for name in files}
    loaded = {
        Path(module.__file__).relative_to(root).as_posix()
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "hf_dilated" and module.__file__ and "engine" in name
    }
    assert loaded <= set(files)
    assert not [name for name in files if "/cli/" in name]
    ast.parse(package_source())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"#@ {hf_dilated.__version__} ", "#@ 999.0 ", "needs hf_dilated 999.0, but"),
        ("# import ", "# from os import ", "was changed or damaged"),
    ],
    ids=["newer", "damaged"],
)
def test_what_cannot_be_taken_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / CODE).write_text(package_source().replace(old, new, 1))
    with pytest.raises(ImportError, match=message):
        run(tmp_path / CODE)


def test_unpacked_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_dilated_code, "HF_MODULES_CACHE", str(tmp_path))
    files = {"package/__init__.py": "one = 1\n", "package/inner/two.py": ""}
    folder = hf_dilated_code._unpacked("1-abc", files)
    assert contents(folder) == {name: text.encode() for name, text in files.items()}
    assert hf_dilated_code._unpacked("1-abc", files) == folder
    assert list(folder.parent.iterdir()) == [folder]
    (folder / "package" / "__init__.py").write_text("one = 2\n")
    with pytest.raises(ImportError, match="not what the checkpoint carries; remove"):
        hf_dilated_code._unpacked("1-abc", files)
