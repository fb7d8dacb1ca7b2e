"""A process that dies half-way: constant memory, and the same call goes on.

`HF_DILATED_PATCH_GB=4.2 pytest -s tests/patching/test_killed.py` does the same with a large checkpoint.
"""

import filecmp
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from hf_dilated import PatchError, patch_checkpoint
from hf_dilated.patching.staging import staging_folder

SIZE = float(os.environ.get("HF_DILATED_PATCH_GB", "0.02")) * 1e9
LAYERS_PER_SHARD = 4
PROGRAM = """
    import os, re, signal, sys
    from pathlib import Path
    from hf_dilated.patching import plan_patch
    plan = plan_patch(sys.argv[1], sys.argv[2], max_position_embeddings=8192, link=False)
    done = {}
    def peak():  # of this process alone; the peak of getrusage is inherited
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    def progress(name, size):
        done[name] = size
        if sum(done.values()) > plan.weights.total_bytes / 2:
            print(peak(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    plan.execute(progress)
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Random bits in shards of a few layers."""
    is_large = SIZE > 1e8
    hidden, inner = (2048, 5632) if is_large else (256, 512)
    layers = LAYERS_PER_SHARD * max(2, round(SIZE / 2 / (4 * hidden**2 + 3 * hidden * inner) / LAYERS_PER_SHARD))
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, tie_word_embeddings=True
    )
    folder = tmp_path / "plain"
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weight_map = {}
    for start in range(0, layers, LAYERS_PER_SHARD):
        stop = start + LAYERS_PER_SHARD
        names = [name for name in shapes if start <= (int(name.split(".")[2]) if "layers" in name else 0) < stop]
        shard = {n: torch.randint(-(2**15), 2**15, shapes[n], dtype=torch.int16).view(torch.bfloat16) for n in names}
        file = f"model-{start // LAYERS_PER_SHARD + 1:05}-of-{layers // LAYERS_PER_SHARD:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = tf.utils.SAFE_WEIGHTS_INDEX_NAME
    (folder / index).write_text(f'{{"metadata": {{}}, "weight_map": {weight_map}}}'.replace("'", '"'))
    return folder


def test_killed_and_resumed(large: Path, tmp_path: Path) -> None:
    destination = tmp_path / "long"
    unfinished = staging_folder(destination)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(large), str(destination)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not destination.exists()
    finished = {path.name: path.stat().st_ino for path in unfinished.glob("*.safetensors")}
    total = len(list(large.glob("*.safetensors")))
    assert 0 < len(finished) < total
    with pytest.raises(PatchError, match="was left unfinished by a call with other options"):
        patch_checkpoint(large, destination, link=False)
    patch_checkpoint(large, destination, max_position_embeddings=8192, link=False)
    assert not unfinished.exists()
    assert all((destination / name).stat().st_ino == inode for name, inode in finished.items())
    shards = [path.name for path in large.glob("*.safetensors")]
    assert filecmp.cmpfiles(large, destination, shards, shallow=False) == (shards, [], [])
    names = {path.name for path in destination.iterdir()}
    assert names == {path.name for path in large.iterdir()}
    size = sum((large / name).stat().st_size for name in shards)
    print(f"half of {size / 1e9:.2f} GB in {total} shards, resident memory at most {int(killed.stdout) / 1e9:.2f} GB")
    assert int(killed.stdout) < 1e9
