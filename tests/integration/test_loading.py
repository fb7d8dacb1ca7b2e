"""What to type to load a checkpoint."""

from transformers import LlamaConfig

from hf_dilated.integration.loading import load_statement


class TheirConfig(LlamaConfig):
    """As Transformers makes it of code that a checkpoint brings."""


TheirConfig.__module__ = "transformers_modules.theirs.configuration"


def test_code_of_a_checkpoint_replaces_the_import_only_if_it_brings_the_package() -> None:
    config = TheirConfig(auto_map={"AutoModelForCausalLM": "modeling.TheirModel"}, architectures=["TheirModel"])
    load = 'AutoModelForCausalLM.from_pretrained("theirs", trust_remote_code=True)'
    for with_package in (True, False):
        statement = load_statement(config, "theirs", with_package=with_package)
        assert load in statement
        assert ("import hf_dilated" in statement) is not with_package
