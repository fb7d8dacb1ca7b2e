"""What to type to load a checkpoint."""

from typing import Any

from transformers.models.auto import modeling_auto

DEFAULT = "AutoModel"


def brings_model(config: Any) -> bool:
    """Whether a configuration, and with it its model, is code that a checkpoint brings and Transformers runs."""
    return type(config).__module__.startswith("transformers_modules.")


def auto_classes(config: Any) -> dict[str, str]:
    """The model classes of a configuration by the names of the AutoClasses that lead to them.

    Example:
        >>> from transformers import LlamaConfig
        >>> auto_classes(LlamaConfig())["AutoModelForCausalLM"]
        'LlamaForCausalLM'
    """
    if brings_model(config):
        found = sorted((getattr(config, "auto_map", None) or {}).items())
        return {name: str(model).rpartition(".")[2] for name, model in found if name.startswith("AutoModel")}
    known = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    models = {name: auto._model_mapping.get(type(config), None) for name, auto in known.items()}
    return {name: model.__name__ for name, model in sorted(models.items()) if isinstance(model, type)}


def load_statement(config: Any, path: str, *, with_package: bool = False) -> str:
    """Return the lines that load a checkpoint of this configuration.

    Args:
        config: The configuration.
        path: The checkpoint.
        with_package: Whether the checkpoint carries this package, for a model whose code it brings.

    Example:
        >>> from transformers import LlamaConfig
        >>> print(load_statement(LlamaConfig(architectures=["LlamaForCausalLM"]), "long"))
        import hf_dilated  # registers the attention backend
        from transformers import AutoModelForCausalLM
        <BLANKLINE>
        model = AutoModelForCausalLM.from_pretrained("long")
    """
    classes = auto_classes(config)
    architectures = config.architectures or ()
    auto_class = next((name for name, model in classes.items() if model in architectures), DEFAULT)
    imports, options = "import hf_dilated  # registers the attention backend\n", ""
    if brings_model(config):
        imports, options = "" if with_package else imports, ", trust_remote_code=True"
    return f'{imports}from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained("{path}"{options})'
